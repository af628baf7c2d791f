"""What narrowing keeps, that it is exact where the stream allows it, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.network import llama
from adapt_jax.pruning import narrow
from tests.support.helpers import UNIFORM, logits, random_params, random_tokens, tiny_config

CONFIGS = {
  'tied': tiny_config('llama', UNIFORM),
  'untied': tiny_config('mistral', UNIFORM),
  'biases': tiny_config('qwen2', UNIFORM, output_bias=True),
  'widths that differ': tiny_config('qwen3', tie_embeddings=False),
  'tied, widths that differ': tiny_config('qwen3'),
  'scales': tiny_config('granite', UNIFORM),
  'layers without rotary embeddings': tiny_config('smollm3', UNIFORM),
}
_READS = {'attention': ('q', 'k', 'v'), 'mlp': ('gate', 'up')}
_NORMS = {'attention': 'attention_norm', 'mlp': 'mlp_norm'}


def narrowed(config, params, width, rows=8, **options):
  params = jax.tree.map(jnp.asarray, params)
  tokens = jnp.asarray(random_tokens(config, rows=rows))
  given = {'micro_batch': 2, 'dtype': jnp.float32, 'compiler': Compiler()} | options
  return narrow.narrow(config, params, tokens, width, **given)


def widened(config, params, width, seed=0):
  """A model of hidden size `width` that computes the same, its stream rotated into a random subspace."""
  small = config.hidden_size
  rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, small)))[0].astype(np.float32)
  # The larger model divides by the root mean square of `width` numbers.
  shrink = (small / width) ** 0.5
  layers = []
  for layer in params['layers']:
    new = dict(layer)
    for block, norm in _NORMS.items():
      inner = dict(layer[block])
      for name in _READS[block]:
        inner[name] = (inner[name] * layer[norm] * shrink) @ rotation.T
      for name in ('o', 'o_bias', 'down', 'down_bias'):
        if name in inner:
          inner[name] = np.tensordot(rotation, inner[name], 1)
      new |= {block: inner, norm: np.ones(width, np.float32)}
    layers.append(new)
  out = {'embed': params['embed'] @ rotation.T, 'layers': layers, 'norm': np.ones(width, np.float32)}
  if 'lm_head' in params:
    out['lm_head'] = (params['lm_head'] * params['norm'] * shrink) @ rotation.T
  else:  # the gains of a tied model are all the same
    out['norm'] *= shrink * params['norm'][0]
  larger = dataclasses.replace(config, hidden_size=width, rms_norm_eps=config.rms_norm_eps * small / width)
  return larger, out


@pytest.mark.parametrize('name', ['tied', 'biases', 'widths that differ', 'scales'])
def test_a_stream_of_few_directions_is_narrowed_exactly(name):
  config = CONFIGS[name]
  params = random_params(config)
  if config.tie_embeddings:
    params['norm'] = np.full_like(params['norm'], 1.5)
  larger, given = widened(config, params, config.hidden_size + 12)
  found = narrowed(larger, given, config.hidden_size)
  small = narrow.narrowed_config(larger, config.hidden_size)
  assert small.rms_norm_eps == pytest.approx(config.rms_norm_eps)
  tokens = random_tokens(config, seed=1)
  expected = np.asarray(logits(config, params, tokens))
  atol = 2e-3 * np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(logits(small, found, tokens)), expected, rtol=0, atol=atol)


@pytest.mark.parametrize('name', ['biases', 'tied, widths that differ', 'layers without rotary embeddings'])
def test_parameters_are_those_that_are_counted_in_their_dtypes(name):
  config, width = CONFIGS[name], 17
  small = narrow.narrowed_config(config, width)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config))
  params['norm'] = params['norm'].astype(np.float32)
  found = narrowed(config, params, width)
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, llama.abstract_params(small))
  assert sum(x.size for x in jax.tree.leaves(found)) == count_params(small)
  assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)
  values = np.asarray(logits(small, found, random_tokens(config)))
  assert np.isfinite(values).all()


def test_the_weights_are_fitted_to_the_rows(monkeypatch):
  """On held-out rows of the same kind, the fitted model is nearer to the dense one than its basis alone."""
  config = CONFIGS['tied']
  params = random_params(config)

  def distance():
    small, found = narrow.narrowed_config(config, 20), narrowed(config, params, 20, rows=64)
    tokens = random_tokens(config, rows=8, seed=1)
    dense, own = (np.asarray(logits(c, p, tokens)) for c, p in ((config, params), (small, found)))
    return np.square(dense - own).mean()

  fitted = distance()
  monkeypatch.setattr(narrow, '_READ_RIDGE', 1e6)
  monkeypatch.setattr(narrow, '_WRITE_RIDGE', 1e6)
  assert fitted < 0.9 * distance()


def test_extreme_gains_of_a_tied_model_stay_on_their_axes():
  """A tied table cannot take the final gains: the axes where they are extreme must not be mixed."""
  config = CONFIGS['tied']
  params = random_params(config)
  params['norm'] = np.ones_like(params['norm'])
  params['norm'][[3, 7]] = -20.0, 30.0
  found = narrowed(config, params, config.hidden_size - 2)
  gains = np.sort(np.asarray(found['norm']))
  scale = (config.hidden_size / (config.hidden_size - 2)) ** 0.5
  np.testing.assert_allclose(gains[[0, -1]], [-20 * scale, 30 * scale], rtol=1e-5)
  np.testing.assert_allclose(gains[1:-1], scale, rtol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_families_that_norm_what_a_block_adds_are_refused(family):
  config = tiny_config(family, UNIFORM)
  if config.traits.post_norm:
    with pytest.raises(InputError, match=f'field = 8 does not work for {family} models'):
      narrow.check(config, 8, 'field')
  else:
    narrow.check(config, 8, 'field')


def test_layers_with_other_groups_of_query_heads_are_refused():
  layers = LayerShape(4, 2, 32), LayerShape(6, 2, 32)
  with pytest.raises(InputError, match='field = 8 needs layers with equally many query heads'):
    narrow.check(tiny_config('llama', layers), 8, 'field')


def test_weights_keep_their_precision_when_activations_have_less():
  config = CONFIGS['untied']
  larger, given = widened(config, random_params(config), config.hidden_size + 12)
  found = narrowed(larger, given, config.hidden_size, dtype=jnp.bfloat16)
  # The rotated embeddings of two tokens have the product of the original ones.
  expected = given['embed'] @ given['embed'].T
  np.testing.assert_allclose(found['embed'] @ found['embed'].T, expected, rtol=0, atol=1e-4 * expected.max())


@pytest.mark.parametrize('width', [0, 10_000])
def test_a_width_out_of_range_is_refused(width):
  config = CONFIGS['tied']
  with pytest.raises(InputError, match=f'must be from 1 to {config.hidden_size - 1}, below the hidden size'):
    narrow.check(config, width, 'field')


def test_weights_that_are_not_finite_are_refused():
  config = CONFIGS['tied']
  params = random_params(config)
  params['layers'][0]['mlp']['up'][0, 0] = np.nan
  with pytest.raises(InputError, match='gives weights that are not finite'):
    narrowed(config, params, 16)
