"""Scoring and correction by one call for each layer: the bits of the programs with a loop over layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network.backend import loop_options
from adapt_jax.pruning import surgery
from adapt_jax.pruning.by_layer import CorrectionByLayer, CurvatureByLayer
from adapt_jax.pruning.compensate import Compensator
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from tests.support.helpers import new_params, stacked_params

LAYERS, ROWS, LENGTH = 3, 8, 10


@pytest.fixture(scope='module')
def model():
  config = ModelConfig('llama', 97, 16, 8, (LayerShape(6, 2, 24),) * LAYERS, RopeConfig(1e4), 1e-5, False)
  tokens = jax.random.randint(jax.random.key(2), (ROWS, LENGTH), 0, config.vocab_size)
  return config, stacked_params(new_params(config), PrunePlan.dense(config)), tokens


def whole(name, program, *args):
  return Compiler()(name, program, *args, xla_options=loop_options())(*args)


@pytest.mark.parametrize('parts', [1, 2])
def test_scores_by_layer(model, monkeypatch, parts):
  config, stacked, tokens = model
  monkeypatch.setattr(Scorer, 'parts', lambda self, M, B, T: parts)
  scorer, compiler, ticks = Scorer(config, 'curvature', micro_batch=2), Compiler(), []
  by_layer = CurvatureByLayer(scorer, *tokens.shape, compiler)
  for _ in range(2):  # the second pass compiles nothing
    scores = by_layer(stacked, tokens, ticks.append)
  assert compiler.counts == {'scoring': 4}
  assert len(ticks) == 4 * parts * LAYERS and sum(ticks) == 2 * by_layer.total
  jax.tree.map(np.testing.assert_array_equal, scores, whole('scoring', scorer, stacked, tokens))


@pytest.mark.parametrize('kind', ['least_squares', 'bias'])
def test_corrections_by_layer(model, kind):
  config, stacked, tokens = model
  plan = PrunePlan(tuple(np.array([True, i != 1]) for i in range(LAYERS)), (np.arange(24) % 3 > 0,) * LAYERS)
  args, ticks = (stacked, surgery.padded_masks(plan), tokens), []
  program, compiler = Compensator(config, kind, 2), Compiler()
  by_layer = CorrectionByLayer(program, ROWS, compiler)
  changes, expected = by_layer(*args, ticks.append), whole('compensation', program, *args)
  assert ticks == [1] * by_layer.total and compiler.counts == {'compensation': 1}
  assert changes.keys() == expected.keys()
  for name, of_layers in changes.items():
    np.testing.assert_array_equal(jnp.stack(of_layers), expected[name])


def test_a_signal_ends_them_between_two_layers(model, monkeypatch):
  config, stacked, tokens = model
  by_layer = CurvatureByLayer(Scorer(config, 'curvature', micro_batch=2), *tokens.shape, Compiler())
  ticks = []

  def tick(amount):
    ticks.append(amount)
    monkeypatch.setattr(preemption, '_noted', 'SIGTERM')

  with pytest.raises(preemption.Preempted):
    by_layer(stacked, tokens, tick)
  assert len(ticks) == 1
