"""Grouped-query attention: over whole rows, in blocks of queries, and with a KV cache."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adapt_jax.models.network import flash, splash
from adapt_jax.models.network.backend import on_cpu
from adapt_jax.models.network.matmul import batch_product
from adapt_jax.models.network.sharding import divides, on_each_device

# The attention of rows with more tokens is computed in a loop over blocks of queries.
WHOLE, WHOLE_ON_CPU = 1024, 2048
BLOCK, BLOCKS = 256, 4  # for shorter rows on a CPU: minimum queries per block, maximum number of blocks


class Logits(NamedTuple):
  """How logits are made of the products of queries and keys: times `scale`, then bounded to ±`cap`."""

  scale: float
  cap: float = 0.0  # 0: not bounded

  def of(self, products: jax.Array) -> jax.Array:
    return soft_cap(products * self.scale, self.cap)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
  """cap · tanh(x / cap), as in Gemma 2 (arXiv 2408.00118); x for a cap of 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def causal_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None = None,
  form: Logits | None = None,
  window: int | jax.Array | None = None,
) -> jax.Array:
  """Softmax(q kᵀ / √H, causal) v with query head n on KV head n // G: [B, T, N, H], softmax in fp32.

  `form` replaces the factor 1 / √H. With `segments_BT`, a token attends only to its own segment; with
  `window`, only to that many tokens, itself included. Long rows are computed in blocks of queries, which the
  backward pass recomputes, so that memory grows with T, not T². GPUs use cuDNN's kernels and TPUs splash
  attention where they can (`flash`, `splash`), unless ADAPT_JAX_FUSED_ATTENTION=0 is in the environment. Both
  need a window that is no array, and cuDNN no cap. On a CPU, shorter rows are also computed in blocks, each
  with the keys up to its last query, because softmax passes over all logits several times there.

  Equivalent to `jax.nn.dot_product_attention(..., is_causal=True)`, but written as batched products over
  B and K, which XLA's CPU backend runs twice as fast, including the gradient. B and K remain two axes, so
  that each can be split over devices.
  """
  T = q_BTNH.shape[1]
  form = form or Logits(q_BTNH.shape[3] ** -0.5)
  if isinstance(window, int) and window >= T:
    window = None
  if fused := _fused(form, q_BTNH, k_BSKH, segments_BT is not None, window):
    letters = ('B.N.', 'B.K.', 'B.K.', 'B.')
    return on_each_device(fused, letters, q_BTNH, k_BSKH, v_BSKH, segments_BT)
  most = WHOLE_ON_CPU if on_cpu() else WHOLE
  if most >= T:
    if on_cpu() and T >= 2 * BLOCK:
      return _in_blocks(form, q_BTNH, k_BSKH, v_BSKH, segments_BT, window)
    return _attend(form, q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BT, jnp.arange(T), window)
  size = max(1, most * most // (1 << (T - 1).bit_length()))
  padded = -(-T // size) * size

  def blocks(x: jax.Array) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, padded - T)) + ((0, 0),) * (x.ndim - 2), mode='edge')
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def attend(block: Any) -> jax.Array:
    of_queries, positions_T = block.get('segments'), block['positions']
    return _attend(form, block['q'], k_BSKH, v_BSKH, of_queries, segments_BT, positions_T, window)

  queries = {'q': blocks(q_BTNH), 'positions': jnp.minimum(jnp.arange(padded), T - 1).reshape(-1, size)}
  if segments_BT is not None:
    queries['segments'] = blocks(segments_BT)
  out = jnp.moveaxis(jax.lax.map(attend, queries), 0, 1)
  return out.reshape(out.shape[0], padded, *out.shape[3:])[:, :T]


def _fused(
  form: Logits, q_BTNH: jax.Array, k_BSKH: jax.Array, segmented: bool, window: Any
) -> Callable[..., jax.Array] | None:
  """The kernel for these queries on what is compiled for, if there is one."""
  if os.environ.get('ADAPT_JAX_FUSED_ATTENTION') == '0' or not divides('B.K.', k_BSKH.shape):
    return None
  if isinstance(window, jax.Array):
    return None
  if flash.takes(q_BTNH, segmented) and not form.cap:
    return functools.partial(flash.flash_attention, scale=form.scale, window=window)
  if splash.takes(q_BTNH):
    return functools.partial(splash.splash_attention, scale=form.scale, cap=form.cap, window=window)
  return None


def _blocks(
  form: Logits,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None,
  window: Any,
) -> jax.Array:
  T = q_BTNH.shape[1]
  count = min(BLOCKS, T // BLOCK)
  parts = []
  for i in range(count):
    start, end = T * i // count, T * (i + 1) // count
    of_queries, of_keys = None, None
    if segments_BT is not None:
      of_queries, of_keys = segments_BT[:, start:end], segments_BT[:, :end]
    q, k, v = q_BTNH[:, start:end], k_BSKH[:, :end], v_BSKH[:, :end]
    parts.append(_attend(form, q, k, v, of_queries, of_keys, jnp.arange(start, end), window))
  return jnp.concatenate(parts, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(form: Logits, *args: Any) -> jax.Array:
  """On a CPU: each block of queries uses the keys up to its own end; the backward pass recomputes it."""
  return _blocks(form, *args)


def _forward(form: Logits, *args: Any) -> tuple[jax.Array, Any]:
  return _blocks(form, *args), args


def _backward(form: Logits, args: Any, g_BTNH: jax.Array) -> tuple[Any, ...]:
  q_BTNH, k_BSKH, v_BSKH, segments_BT, window = args
  # XLA's CPU backend would merge what `jax.checkpoint` recomputes with the forward pass, as a common
  # subexpression, and keep the logits of all layers. Adding 0 times the gradient to the queries prevents it.
  q_BTNH += 0 * g_BTNH
  _, gradient = jax.vjp(lambda q, k, v: _blocks(form, q, k, v, segments_BT, window), q_BTNH, k_BSKH, v_BSKH)
  return *gradient(g_BTNH), None, None


_in_blocks.defvjp(_forward, _backward)


def _attend(
  form: Logits,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None,
  segments_BS: jax.Array | None,
  positions_T: jax.Array,
  window: Any,
) -> jax.Array:
  """Causal attention of queries at the given positions of the row."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
  k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
  logits_BKRS = form.of(batch_product(q_BKRH, k_BKSH, -1))
  visible = positions_T[:, None] >= jnp.arange(S)
  if window is not None:
    visible &= positions_T[:, None] - jnp.arange(S) < window
  if segments_BT is not None and segments_BS is not None:
    visible &= segments_BT[:, :, None] == segments_BS[:, None, :]
    visible = visible[:, None, None]  # [B, 1, 1, T, S]
  logits_BKGTS = jnp.where(visible, logits_BKRS.reshape(B, K, -1, T, S), -jnp.inf)
  weights_BKRS = jax.nn.softmax(logits_BKGTS, axis=-1).reshape(logits_BKRS.shape).astype(v_BKSH.dtype)
  out_BKRH = batch_product(weights_BKRS, v_BKSH, -2, v_BKSH.dtype)
  return out_BKRH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def cached_attention(
  q_BTNH: jax.Array,
  k_BKTH: jax.Array,
  v_BKTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  before_BS: jax.Array,
  form: Logits,
) -> jax.Array:
  """Attention of one token per row (T = 1) to itself and to the cache slots in `before_BS`: [B, T, N, H].

  The token is written to the cache after it is read, so that the write can happen in place.
  """
  q_BKGH = q_BTNH.reshape(q_BTNH.shape[0], k_BKSH.shape[1], -1, k_BKSH.shape[3])

  def logits(k: jax.Array) -> jax.Array:
    return form.of(jnp.einsum('bkgh,bksh->bkgs', q_BKGH, k, preferred_element_type=jnp.float32))

  before_BKGS = jnp.where(before_BS[:, None, None], logits(k_BKSH), -jnp.inf)
  weights = jax.nn.softmax(jnp.concatenate([before_BKGS, logits(k_BKTH)], axis=-1), axis=-1)
  before, own = jnp.split(weights.astype(v_BKSH.dtype), [k_BKSH.shape[2]], axis=-1)
  mixed_BKGH = jnp.einsum('bkgs,bksh->bkgh', before, v_BKSH, preferred_element_type=jnp.float32)
  return (mixed_BKGH + own * v_BKTH).astype(q_BTNH.dtype).reshape(q_BTNH.shape)
