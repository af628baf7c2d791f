"""Causal attention by cuDNN's flash attention, on NVIDIA GPUs: memory grows with T, not T².

cuDNN does not support segments here: JAX computes wrong offsets of grouped heads for its packed format
(jax-ml/jax#39521), and a mask would be a bias of T² numbers with a gradient. So `_BITS` numbers are appended
to each head: for a query, the bits of its segment number i; for a key, −`_FAR` for every bit that is not set
in its segment number j. Their product is exactly 0 if j has all bits of i: for j = i, and for no j below i.
Segments are numbered along the row, and causal attention excludes later keys.
"""

import jax
import jax.numpy as jnp

from adapt_jax.models.network import backend

_BITS = 16  # a multiple of 8, as head_dim must be
_FAR = 2.0**16


def widest_head() -> int:
  """The largest head_dim that cuDNN supports, forward and backward, on what is compiled for; 0 without cuDNN.

  As of cuDNN 9.18 (docs.nvidia.com/cudnn/operations/Attention).
  """
  platform = backend.platform()
  generation = platform.capability[0] if platform.name == 'cuda' else 0
  return 0 if generation < 8 else 256 if generation == 9 else 128


def takes(q_BTNH: jax.Array, segmented: bool) -> bool:
  """Whether `flash_attention` supports these queries; otherwise it raises or mixes up segments."""
  T, _, H = q_BTNH.shape[1:]
  # JAX does not support the gradient for an odd T.
  if q_BTNH.dtype != jnp.bfloat16 or H % 8 or T % 2 or (segmented and T > 1 << _BITS):
    return False
  return H + segmented * _BITS <= widest_head()


def flash_attention(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  segments_BT: jax.Array | None,
  scale: float,
  window: int | None = None,
) -> jax.Array:
  """Same as `models.network.attention.causal_attention`; tokens of one segment must be contiguous."""
  H = q_BTNH.shape[-1]
  if segments_BT is not None:
    changes_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
    number_BT1 = jnp.cumsum(changes_BT, axis=1)[..., None]
    bits_BTC = number_BT1 >> jnp.arange(_BITS) & 1
    q_BTNH, k_BSKH = _append(q_BTNH, bits_BTC), _append(k_BSKH, _FAR * (bits_BTC - 1))
    v_BSKH = jnp.pad(v_BSKH, ((0, 0), (0, 0), (0, 0), (0, _BITS)))  # must have the same width
  # JAX counts the tokens before the query, we its own too.
  before = None if window is None else (window - 1, 0)
  out = jax.nn.dot_product_attention(
    q_BTNH, k_BSKH, v_BSKH, scale=scale, is_causal=True, local_window_size=before, implementation='cudnn'
  )
  return out[..., :H]


def _append(x_BTNH: jax.Array, extra_BTC: jax.Array) -> jax.Array:
  """Appends the same numbers to every head of a token."""
  extra_BTNC = jnp.broadcast_to(extra_BTC[:, :, None], (*x_BTNH.shape[:3], extra_BTC.shape[-1]))
  return jnp.concatenate([x_BTNH, extra_BTNC.astype(x_BTNH.dtype)], axis=-1)
