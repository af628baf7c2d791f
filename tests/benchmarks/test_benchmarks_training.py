"""Benchmarks of training and pruning: their limits from an export's header, and their tables."""

import pytest

from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.pipeline.flops import forward as forward_flops
from benchmarks import demo_models, pruning
from tests.support.helpers import random_params, tiny_config


@pytest.fixture(scope='module')
def export(tmp_path_factory):
  config = tiny_config('llama', (LayerShape(6, 3, 40), LayerShape(4, 2, 24)), vocab_size=64)
  path = tmp_path_factory.mktemp('export')
  save_params(config, random_params(config), path)
  return config, path


def test_limits_are_those_of_the_model(export):
  config, path = export
  assert demo_models.parameters(path) == count_params(config)
  assert demo_models.head_weights(path) == config.vocab_size * config.hidden_size
  assert demo_models.forward_flops(path, 64) == pytest.approx(forward_flops(config, 64), rel=0.02)
  head = 2 * demo_models.head_weights(path)
  layers = demo_models.forward_flops(path, 64) - head
  assert pruning.scoring_flops(path) == 4 * layers + 2 * head


def test_programs_that_leave_other_models_are_not_compared():
  pruning.check_sizes({'ours float32': 110_602_944, 'torch float32': 110_606_400})
  with pytest.raises(SystemExit, match='102,?074,?688'):
    pruning.check_sizes({'ours float32': 110_602_944, 'torch float32': 102_074_688})
