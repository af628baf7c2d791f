"""Attention over long rows: blocks of queries give what all at once do, and need less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import layers

B, N, K, H = 2, 6, 2, 8


def inputs(length, segments):
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((B, length, heads, H)).astype(np.float32) for heads in (N, K, K))
  ids = np.sort(rng.integers(0, 3, (B, length)), axis=1) if segments else None
  return q, k, v, ids


@pytest.mark.parametrize('segments', [False, True])
@pytest.mark.parametrize('length', [17, 40, 64])
def test_blocks_of_queries_change_nothing(length, segments, monkeypatch):
  """Outputs and gradients; lengths that the blocks divide and that they do not."""
  *qkv, ids = inputs(length, segments)

  def run(q, k, v):
    out = layers.causal_attention(q, k, v, ids)
    return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

  (_, expected), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*qkv)
  monkeypatch.setattr(layers, 'WHOLE', 16)
  (_, found), blocked = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*qkv)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
  for a, b in zip(blocked, gradients, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize('differentiate', [False, True])
def test_memory_of_long_rows(differentiate):
  """Of a row of 16,384 tokens: all logits at once would be 6.4 GB."""
  length = 16_384
  shapes = [jax.ShapeDtypeStruct((1, length, heads, H), jnp.float32) for heads in (N, K, K)]

  def run(q, k, v):
    return layers.causal_attention(q, k, v).sum()

  program = jax.jit(jax.grad(run, (0, 1, 2)) if differentiate else run).lower(*shapes).compile()
  assert program.memory_analysis().temp_size_in_bytes < 0.5e9
