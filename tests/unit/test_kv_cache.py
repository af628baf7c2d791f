"""Decoding with a cache computes what the whole forward pass computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.families import FAMILIES
from adapt_jax.models.network import kv_cache
from tests.support.helpers import VARIED, logits, random_params, random_tokens, tiny_config

CONFIGS = {
  **{family: tiny_config(family, VARIED[:2]) for family in FAMILIES},
  'all-biases': tiny_config('llama', VARIED[:2], qkv_bias=True, output_bias=True),
}
LENGTHS = np.array([9, 3, 1], np.int32)
STEPS = 5


@functools.partial(jax.jit, static_argnums=(0, 4), static_argnames='dtype')
def prefill(config, params, tokens, lengths, slots, dtype=jnp.float32):
  return kv_cache.prefill(config, params, tokens, lengths, slots, dtype=dtype)


@functools.partial(jax.jit, static_argnums=(0, 5), static_argnames='dtype')
def decode_step(config, params, cache, tokens, lengths, padded, step, dtype=jnp.float32):
  return kv_cache.decode_step(config, params, cache, tokens, lengths, padded, step, dtype=dtype)


def assert_close(ours, expected):
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_of_prompts_of_several_lengths_are_those_without_a_cache(name):
  """What pads the prompts, and the slots between them and what is decoded, changes nothing."""
  config = CONFIGS[name]
  params, text = random_params(config), random_tokens(config, rows=3, length=9 + STEPS)
  whole = np.asarray(logits(config, params, text))
  prompts = np.where(np.arange(12) < LENGTHS[:, None], text[:, :12], random_tokens(config, 3, 12, seed=1))
  found, cache = prefill(config, params, prompts, LENGTHS, 20)
  rows = np.arange(3)
  assert_close(found, whole[rows, LENGTHS - 1])
  for step in range(STEPS):
    at = LENGTHS + step
    found, cache = decode_step(config, params, cache, text[rows, at], LENGTHS, 12, step)
    assert_close(found, whole[rows, at])


def test_a_cache_has_each_layers_own_heads_in_the_dtype_of_the_activations():
  config = CONFIGS['qwen3']
  tokens = random_tokens(config, rows=3, length=12)
  args = config, random_params(config)
  _, cache = prefill(*args, tokens, LENGTHS, 20, dtype=jnp.bfloat16)
  found = {name: [(layer[name].shape, layer[name].dtype) for layer in cache] for name in cache[0]}
  expected = [((3, shape.num_kv_heads, 20, 12), jnp.bfloat16) for shape in config.layers]
  assert found == {'k_cache': expected, 'v_cache': expected}
  logits_BV, new = decode_step(*args, cache, tokens[:, 0], LENGTHS, 12, 0, dtype=jnp.bfloat16)
  assert logits_BV.dtype == jnp.float32
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, cache)
  changed = {
    tuple(np.flatnonzero((a != b).any((0, 1, 3))))
    for a, b in zip(*map(jax.tree.leaves, (new, cache)), strict=True)
  }
  assert changed == {(12,)}  # one slot is written, the rest stays
