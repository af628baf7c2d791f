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
