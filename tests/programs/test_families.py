"""Pruning in every family: zeros inside the loop are the compacted model, and least squares adjust it."""

import jax
import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.network import llama
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from tests.support.helpers import logits, random_params, random_tokens, stacked_params, tiny_config

LAYERS = (LayerShape(6, 2, 24),) * 3
NEW = [name for name in FAMILIES if name not in ('llama', 'mistral', 'qwen2', 'qwen3')]


def pruned_plan(config):
  """Every second channel goes, and a group of the second layer where groups may go."""
  plan = PrunePlan.dense(config)
  for mask in plan.ffn:
    mask[::2] = False
  if not config.traits.joint_qk_norm:
    plan.kv[1][0] = False
  return plan


def scanned(config, shape, stacked, tokens):
  """Logits by a scan over stacked layers, as scoring runs them."""
  tables = llama.rope(config, tokens.shape[1])

  def step(x_BTD, xs):
    i, layer = xs
    return llama.apply_layer(config, shape, layer, x_BTD, tables.of(i)), None

  def run(stacked, tokens):
    x_BTD = llama.embed(config, stacked, tokens, np.float32)
    x_BTD, _ = jax.lax.scan(step, x_BTD, (np.arange(config.num_layers), stacked['layers']))
    return llama.logits(config, stacked, llama.final_norm(config, stacked, x_BTD))

  return jax.jit(run)(stacked, tokens)


@pytest.mark.parametrize('family', NEW)
def test_zeros_inside_the_loop_are_the_compacted_model(family):
  config = tiny_config(family, LAYERS)
  params, tokens, plan = random_params(config), random_tokens(config, length=24), pruned_plan(config)
  small = surgery.compact(params, plan)
  expected = logits(plan.pruned_config(config), small, tokens)
  np.testing.assert_allclose(logits(config, surgery.zero(params, plan), tokens), expected, rtol=0, atol=2e-5)
  found = scanned(config, LAYERS[0], stacked_params(small, plan), tokens)
  np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('family', ['gemma2', 'olmo2'])
def test_pruning_lands_on_the_target_and_least_squares_helps(family):
  config = tiny_config(family, LAYERS[:2])
  model, rows = aj.Model(config, random_params(config)), random_tokens(config, rows=8, length=24)
  target = 0.8 * count_params(config)
  small, plan = aj.prune(model, rows, target=0.8, method='obs', heal=0, align_ffn=1)
  assert small.num_params == plan.params(config) <= target < 1.05 * small.num_params
  expected = logits(config, model.params, rows)
  plain = logits(small.config, surgery.compact(model.params, plan), rows)
  adjusted = logits(small.config, small.params, rows)
  assert np.square(adjusted - expected).mean() < np.square(plain - expected).mean()
  small, plan = aj.prune(
    model, rows, target=0.8, method='adapt', compensate='none', steps=20, heal=0, align_ffn=1
  )
  assert small.num_params <= target
  assert plan.kv_widths.tolist() == [2, 2] or not config.traits.joint_qk_norm
