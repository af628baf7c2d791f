"""Compensation against the problem it states, solved on its own, and what a user gains by it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network import llama
from adapt_jax.pruning import compensate, surgery
from adapt_jax.pruning.compensate import Compensator
from adapt_jax.pruning.plan import PrunePlan
from tests.support.helpers import new_params, stacked_params

VOCAB = 61
attend, feed = (jax.jit(f, static_argnums=(0, 1)) for f in (llama.attend, llama.feed))


def make_model(output_bias=False, family='llama', **fields):
  shapes = (LayerShape(6, 3, 32),) * 3
  config = ModelConfig(family, VOCAB, 24, 8, shapes, RopeConfig(1e4), 1e-5, False, **fields)
  params = new_params(config)
  return surgery.with_output_bias(config, params) if output_bias else (config, params)


def make_tokens(rows=16):
  return jax.random.randint(jax.random.key(1), (rows, 12), 0, VOCAB)


def make_plan(config, seed=0):
  """Two of three KV groups and 24 of 32 channels of every layer."""
  rng = np.random.default_rng(seed)

  def keep(size, count):
    mask = np.zeros(size, bool)
    mask[rng.choice(size, count, replace=False)] = True
    return mask

  return PrunePlan(tuple(keep(3, 2) for _ in config.layers), tuple(keep(32, 24) for _ in config.layers))


def compensated(config, params, plan, kind, tokens, micro_batch=4):
  """The parameters before compaction, and the changes."""
  dense = PrunePlan.dense(config)
  stacked = stacked_params(params, dense)
  masks = tuple(map(jnp.asarray, surgery.padded_masks(plan)))
  changes = jax.jit(Compensator(config, kind, micro_batch))(stacked, masks, tokens)
  return compensate.add(params, dense, changes), changes


def streams(config, params, tokens):
  """Of every layer: before, what enters o_proj, between, what enters down_proj, after."""
  x, tables, out = params['embed'][tokens], llama.rope(config, tokens.shape[1]).of(0), []
  for shape, layer in zip(config.layers, params['layers'], strict=True):
    middle, o_inputs = attend(config, shape, layer, x, tables)
    y, down_inputs = feed(config, shape, layer, middle)
    out.append([np.asarray(v, np.float64) for v in (x, o_inputs, middle, down_inputs, y)])
    x = y
  return out


@pytest.mark.parametrize(
  'model', [{}, {'family': 'granite', 'residual_scale': 0.5}, {'family': 'gemma2'}], ids=str
)
def test_least_squares_solve_the_stated_problem_layer_by_layer(model):
  """Every layer sees the stream that the corrected layers before it leave."""
  config, params = make_model(**model)
  plan, tokens = make_plan(config), make_tokens(rows=15)
  new, _ = compensated(config, params, plan, 'least_squares', tokens, micro_batch=5)
  ours = surgery.zero(new, plan)
  after = streams(config, ours, tokens)  # the pruned model as it ends up
  before = streams(config, params, tokens)
  D = config.hidden_size
  for i, layer in enumerate(params['layers']):
    for x, inputs, goal, block, name, mask in (
      (0, 1, 2, 'attention', 'o', np.repeat(plan.kv[i], 16)),
      (2, 3, 4, 'mlp', 'down', plan.ffn[i]),
    ):
      # The layer's own inputs, nothing pruned in it, on the stream it sees.
      run = jnp.float32(after[i][x])
      tables = llama.rope(config, tokens.shape[1]).of(0)
      half = attend(config, config.layers[i], layer, run, tables)
      if name == 'down':
        half = feed(config, config.layers[i], layer, run)
      c0 = np.asarray(half[1], np.float64)
      w = np.asarray(layer[block][name], np.float64).reshape(D, -1)
      c = np.where(mask, c0, 0)
      np.testing.assert_allclose(c, after[i][inputs], atol=1e-4)
      t = (1 - compensate.PULL) * c0 @ w.T
      if config.traits.post_norm:  # what the block itself adds is known only before its norm
        t += compensate.PULL * before[i][inputs] @ w.T
      else:
        t += compensate.PULL * (before[i][goal] - after[i][x]).reshape(-1, D) / config.residual_scale
      # The 32 kept inputs of attention reach the largest ridge; the 24 of 32 of the MLP do not.
      share = compensate.RIDGE + compensate.RIDGE_FOR_EVIDENCE * mask.sum() / tokens.size
      share = min(share, compensate.LARGEST_RIDGE)
      ridge = share * np.median(np.square(c).sum(0)[mask])
      kept = c[:, mask]
      expected = np.zeros_like(w)
      inner = np.linalg.inv(kept.T @ kept + ridge * np.eye(mask.sum()))
      expected[:, mask] = (t.T @ kept + ridge * w[:, mask]) @ inner
      found = np.asarray(ours['layers'][i][block][name], np.float64).reshape(D, -1)
      np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_nothing_changes_where_nothing_is_pruned():
  config, params = make_model()
  _, changes = compensated(config, params, PrunePlan.dense(config), 'least_squares', make_tokens())
  assert all(np.abs(change).max() < 1e-5 for change in changes.values())


@pytest.mark.parametrize('kind', ['least_squares', 'bias'])
def test_the_model_ends_closer_to_what_it_was(kind):
  """On tokens that it was not solved on."""
  config, params = make_model(output_bias=kind == 'bias')
  plan, held_out = make_plan(config), jax.random.randint(jax.random.key(7), (16, 12), 0, VOCAB)
  new, changes = compensated(config, params, plan, kind, make_tokens(64))
  logits = jax.jit(lambda p: llama.apply(config, p, held_out))
  dense, plain, ours = (logits(p) for p in (params, surgery.zero(params, plan), surgery.zero(new, plan)))
  assert jnp.square(ours - dense).mean() < 0.9 * jnp.square(plain - dense).mean()
  assert set(changes) == ({'o', 'down'} if kind == 'least_squares' else {'o_bias', 'down_bias'})


def test_a_bias_restores_the_mean_of_what_each_layer_adds():
  config, params = make_model(output_bias=True)
  plan, tokens = make_plan(config), make_tokens()
  new, _ = compensated(config, params, plan, 'bias', tokens)
  ours = streams(config, surgery.zero(new, plan), tokens)
  for i, layer in enumerate(params['layers']):
    own, _ = feed(config, config.layers[i], layer, jnp.float32(ours[i][2]))
    np.testing.assert_allclose(ours[i][4].mean((0, 1)), np.asarray(own).mean((0, 1)), atol=1e-4)


def test_a_second_stage_adds_to_what_the_first_left():
  """Changes are in the dense numbering; the parameters have lost groups, and a whole layer."""
  config, params = make_model()
  first = make_plan(config).without_layer(1)
  second = PrunePlan(first.kv, tuple(m & (np.arange(32) > 4) for m in first.ffn))
  compact = surgery.compact(params, first)
  stacked = stacked_params(compact, first)
  masks = tuple(map(jnp.asarray, surgery.padded_masks(second)))
  changes = jax.jit(Compensator(config, 'least_squares', 4))(stacked, masks, make_tokens())
  new = surgery.compact(compensate.add(compact, first, changes), second.relative_to(first))
  names = {'o': 'attention', 'down': 'mlp'}
  full = {n: stacked['layers'][block][n] + changes[n] for n, block in names.items()}
  for tree, i in zip(new['layers'], (0, 2), strict=True):
    np.testing.assert_array_equal(tree['attention']['o'], full['o'][i][:, np.flatnonzero(second.kv[i])])
    np.testing.assert_array_equal(tree['mlp']['down'], full['down'][i][:, np.flatnonzero(second.ffn[i])])


def test_a_layer_that_is_gone_passes_the_stream_on():
  """Also one with biases: the layers after it are corrected for what compaction leaves."""
  config, params = make_model(output_bias=True)
  layers = [jax.tree.map(lambda x: x, layer) for layer in params['layers']]
  layers[1]['attention']['o_bias'] += 1.0
  params = params | {'layers': layers}
  plan, tokens = PrunePlan.dense(config).without_layer(1), make_tokens()
  new, _ = compensated(config, params, plan, 'bias', tokens)
  pruned = dataclasses.replace(config, layers=(config.layers[0], config.layers[2]))
  ours = streams(pruned, surgery.compact(new, plan), tokens)
  own, _ = feed(config, config.layers[2], params['layers'][2], jnp.float32(ours[1][2]))
  np.testing.assert_allclose(ours[1][4].mean((0, 1)), np.asarray(own).mean((0, 1)), atol=1e-4)
