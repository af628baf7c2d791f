"""SliceGPT: what slicing must keep, what it costs, and which widths it lands on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import count_params
from adapt_jax.models.network import llama
from adapt_jax.pruning import slicegpt
from tests.support.helpers import UNIFORM, logits, random_params, random_tokens, tiny_config

CONFIGS = {
  'tied': tiny_config('llama', UNIFORM),
  'untied': tiny_config('mistral', UNIFORM),
  'biases': tiny_config('qwen2', UNIFORM, output_bias=True),
  'widths that differ': tiny_config('qwen3'),
}


def sliced(config, width, tokens):
  params = jax.tree.map(jnp.asarray, random_params(config))
  rows = jnp.asarray(tokens).reshape(-1, 2, tokens.shape[1])
  options = {'dtype': jnp.float32, 'compiler': Compiler()}
  return slicegpt.slice_model(config, params, rows, width, **options)


@pytest.mark.parametrize('name', CONFIGS)
def test_without_slicing_rotations_keep_the_function(name):
  config = CONFIGS[name]
  params = sliced(config, config.hidden_size, random_tokens(config, rows=4))
  small = slicegpt.sliced_config(config, config.hidden_size)
  tokens = random_tokens(config, seed=1)
  expected = np.asarray(logits(config, random_params(config), tokens))
  np.testing.assert_allclose(np.asarray(logits(small, params, tokens)), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize('name', CONFIGS)
def test_parameters_are_those_that_are_counted(name):
  config, width = CONFIGS[name], 17
  small = slicegpt.sliced_config(config, width)
  params = sliced(config, width, random_tokens(config, rows=4))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, llama.abstract_params(small))
  assert sum(x.size for x in jax.tree.leaves(params)) == count_params(small)


def test_the_width_is_the_largest_that_fits():
  config = tiny_config('llama', UNIFORM)
  for target in (count_params(config), 9_000, 3_000):
    d = slicegpt.width_for(config, target)
    assert count_params(slicegpt.sliced_config(config, d)) <= target
    assert count_params(slicegpt.sliced_config(config, d + 1)) > target
  assert slicegpt.width_for(config, 10) == 0


def test_what_the_text_never_uses_is_sliced_for_nothing():
  """A stream of rank 20 keeps its function in 20 numbers; in 12 it does not."""
  config = tiny_config('mistral', UNIFORM)
  basis = np.linalg.qr(np.random.default_rng(0).standard_normal((48, 20)))[0].astype(np.float32)
  params = jax.tree.map(jnp.asarray, random_params(config))
  project = basis @ basis.T
  params['embed'] = params['embed'] @ project
  for layer in params['layers']:
    layer['attention']['o'] = jnp.tensordot(project, layer['attention']['o'], 1)
    layer['mlp']['down'] = project @ layer['mlp']['down']
  tokens = random_tokens(config, rows=8)
  rows = jnp.asarray(tokens).reshape(-1, 2, tokens.shape[1])
  expected = np.asarray(logits(config, params, tokens))

  def error(width):
    options = {'dtype': jnp.float32, 'compiler': Compiler()}
    found = slicegpt.slice_model(config, params, rows, width, **options)
    return np.abs(np.asarray(logits(slicegpt.sliced_config(config, width), found, tokens)) - expected).max()

  assert error(20) < 5e-3 < 0.3 < error(12)
