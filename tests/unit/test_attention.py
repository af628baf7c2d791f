"""Attention over long rows: blocks of queries give what all at once do, and need less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.network import attention
from adapt_jax.models.network.backend import made_for
from adapt_jax.models.network.matmul import dot
from tests.support.helpers import compiled_factors

B, N, K, H = 2, 6, 2, 8


def inputs(length, segments):
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal((B, length, heads, H)).astype(np.float32) for heads in (N, K, K))
  ids = np.sort(rng.integers(0, 3, (B, length)), axis=1) if segments else None
  return q, k, v, ids


def outputs(fn, *args):
  """Its output, and the gradients of q, k and v."""

  def run(*args):
    out = fn(*args)
    return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

  (_, out), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*args)
  return out, *gradients


def assert_close(ours, expected):
  for a, b, atol in zip(ours, expected, (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(('length', 'segments'), [(17, True), (40, False)])
@pytest.mark.parametrize(('limit', 'value'), [('WHOLE_ON_CPU', 16), ('BLOCK', 8)])
def test_blocks_of_queries_change_nothing(limit, value, length, segments, monkeypatch):
  """Outputs and gradients; lengths that the blocks divide and that they do not."""
  *qkv, ids = inputs(length, segments)

  expected = outputs(lambda q, k, v: attention.causal_attention(q, k, v, ids), *qkv)
  monkeypatch.setattr(attention, limit, value)
  assert_close(outputs(lambda q, k, v: attention.causal_attention(q, k, v, ids), *qkv), expected)


@pytest.mark.parametrize(('limit', 'traced'), [('', False), ('WHOLE_ON_CPU', True), ('BLOCK', True)])
def test_window_and_cap(limit, traced, monkeypatch):
  """Against the definition, all at once and in blocks; a window may be traced, as in a scan over layers."""
  *qkv, ids = inputs(40, True)
  form = attention.Logits(0.7, 2.0)
  if limit:
    monkeypatch.setattr(attention, limit, 8)

  def run(q, k, v, window):
    return attention.causal_attention(q, k, v, ids, form, window if traced else 7)

  def defined(q, k, v):
    logits = jnp.einsum('btnh,bsnh->bnts', q, jnp.repeat(k, N // K, axis=2))
    back = jnp.arange(40)[:, None] - jnp.arange(40)
    seen = (back >= 0) & (back < 7) & (ids[:, None, :, None] == ids[:, None, None])
    weights = jax.nn.softmax(jnp.where(seen, 2 * jnp.tanh(0.35 * logits), -jnp.inf), axis=-1)
    return jnp.einsum('bnts,bsnh->btnh', weights, jnp.repeat(v, N // K, axis=2))

  assert_close(outputs(run, *qkv, 7), outputs(defined, *qkv))


@pytest.mark.parametrize(('length', 'blocks'), [(1024, False), (1025, True)])
def test_accelerators_hold_no_logits_of_long_rows(length, blocks):
  """Without cuDNN's kernels: up to 1,024 tokens all at once, beyond that 512 queries or fewer."""
  shapes = [jax.ShapeDtypeStruct((1, length, heads, H), jnp.bfloat16) for heads in (N, K, K)]
  with made_for('gpu'):
    lowered = jax.jit(lambda *qkv: attention.causal_attention(*qkv)).lower(*shapes).as_text()
  assert (f'{length}x{length}x' not in lowered) == blocks == ('stablehlo.while' in lowered)


def test_queries_do_not_meet_most_later_keys(monkeypatch):
  """On a CPU: 5/8 of all pairs at 1,024 tokens."""
  shapes = [jax.ShapeDtypeStruct((1, 1024, heads, H), jnp.float32) for heads in (N, K, K)]

  def flops():
    program = jax.jit(lambda *qkv: attention.causal_attention(*qkv)).lower(*shapes).compile()
    return program.cost_analysis()['flops']

  found = flops()
  monkeypatch.setattr(attention, 'BLOCKS', 1)
  assert found == pytest.approx(5 / 8 * flops(), rel=0.01)


def test_products_in_bfloat16_are_computed_in_it():
  """On a CPU that can; XLA would fold transposes of keys and values into products, which then are in fp32."""
  factor = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
  plain = compiled_factors(lambda a, b: dot(a, b, 0), factor, factor)
  if plain == {'f32'}:
    pytest.skip('this CPU has no products in bfloat16')
  q, k, v = (jax.ShapeDtypeStruct((1, 512, heads, 64), jnp.bfloat16) for heads in (N, K, K))

  def run(q, k, v, g):
    out, pull = jax.vjp(attention.causal_attention, q, k, v)
    return out, pull(g)

  assert plain == compiled_factors(run, q, k, v, q) == {'bf16'}


def test_memory_of_long_rows():
  """Of a row of 16,384 tokens: all logits at once would be 6.4 GB."""
  length = 16_384
  shapes = [jax.ShapeDtypeStruct((1, length, heads, H), jnp.float32) for heads in (N, K, K)]

  def run(q, k, v):
    return attention.causal_attention(q, k, v).sum()

  program = jax.jit(jax.grad(run, (0, 1, 2))).lower(*shapes).compile()
  assert program.memory_analysis().temp_size_in_bytes < 0.5e9
