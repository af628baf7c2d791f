"""Causal attention by JAX's splash attention, a Pallas kernel for TPUs: memory grows with T, not T².

It computes blocks of logits on the chip, as FlashAttention does (Dao et al., arXiv 2205.14135), forward and
backward, and skips blocks of later keys and those before a window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import (
  CausalMask,
  LocalMask,
  MultiHeadMask,
)

from adapt_jax.models.network import backend

_LEAST = 128  # the lanes of a TPU: rows are padded to a multiple
_BLOCKS = (512, 256, _LEAST)


def takes(q_BTNH: jax.Array) -> bool:
  """Whether `splash_attention` supports these queries, and they fill at least one block."""
  return backend.on_tpu() and q_BTNH.shape[1] >= _LEAST


def splash_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None,
  scale: float,
  cap: float = 0.0,
  window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Same as `models.network.attention.causal_attention`, with this factor and bound of the logits.

  With `interpret` it runs on any device, slowly.
  """
  T, N = q_BTNH.shape[1:3]
  length = -(-T // _LEAST) * _LEAST
  # Keys that are appended come after all queries.
  q_BNTH, k_BKSH, v_BKSH = (
    jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    for x in (q_BTNH * scale, k_BSKH, v_BSKH)
  )
  segments = None
  if segments_BT is not None:
    padded_BT = jnp.pad(segments_BT, ((0, 0), (0, length - T)))
    segments = kernels.SegmentIds(padded_BT, padded_BT)
  out_BNTH: Any = jax.vmap(_kernel(length, N, cap, window, interpret))(q_BNTH, k_BKSH, v_BKSH, segments)
  return out_BNTH.transpose(0, 2, 1, 3)[:, :T]


def _kernel(
  length: int, heads: int, cap: float, window: int | None, interpret: bool
) -> kernels.SplashAttentionKernel:
  size, shape = next(size for size in _BLOCKS if length % size == 0), (length, length)
  mask = CausalMask(shape) if window is None else LocalMask(shape, (window - 1, 0), offset=0)
  return kernels.make_splash_mha(
    MultiHeadMask([mask] * heads),
    block_sizes=kernels.BlockSizes(
      block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    ),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=cap or None,
    interpret=interpret,
  )
