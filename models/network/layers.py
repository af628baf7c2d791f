"""Flax modules of one decoder layer.

Weights keep Hugging Face's element order, with separate head axes: a KV group
is an index along K, an MLP channel is an index along F, and loading or saving
is a reshape. Matrix products run on flattened tokens: XLA's CPU backend takes
twice as long for the gradient of a product with a three-dimensional activation.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.network.attention import cached_attention, causal_attention
from adapt_jax.models.network.matmul import is_single_row, product
from adapt_jax.models.network.rope import apply_rope
from adapt_jax.models.network.sharding import constrain

_init = nn.initializers.normal(0.02)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
  """Root-mean-square norm over the last axis (Zhang and Sennrich, arXiv 1910.07467), in fp32."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def sliced_norm(x: jax.Array, width: int, eps: float) -> jax.Array:
  """RMS norm without gains of a vector sliced from `width` numbers; the removed numbers count as zeros."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) / width + eps)
  return (x32 * scale).astype(x.dtype)


def project(x_TD: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
  """x [T, inputs] times a weight stored as [out, in], with its axes flattened to two."""
  return product(x_TD, weight.reshape(-1, inputs))


class Attention(nn.Module):
  """Causal grouped-query attention with rotary positions; optional biases and QK norm.

  With `before_BS`, x has one token per row, which attends to itself and to the given slots of `k_cache` and
  `v_cache` [B, K, S, H] in the collection `cache`. If it is mutable, x's own keys and values replace them.
  """

  config: ModelConfig
  shape: LayerShape

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments_BT: jax.Array | None = None,
    before_BS: jax.Array | None = None,
  ) -> jax.Array:
    c, B, T = self.config, *x_BTD.shape[:2]
    D, K, G, H = c.hidden_size, self.shape.num_kv_heads, self.shape.group_size, c.head_dim
    q_KGHD = self.param('q', _init, (K, G, H, D))
    k_KHD = self.param('k', _init, (K, H, D))
    v_KHD = self.param('v', _init, (K, H, D))
    o_DKGH = self.param('o', _init, (D, K, G, H))

    x_TD = x_BTD.reshape(-1, D)
    q, k, v = (project(x_TD, w, D) for w in (q_KGHD, k_KHD, v_KHD))
    if c.qkv_bias:
      q += self.param('q_bias', nn.initializers.zeros, (K, G, H)).astype(q.dtype).reshape(-1)
      k += self.param('k_bias', nn.initializers.zeros, (K, H)).astype(k.dtype).reshape(-1)
      v += self.param('v_bias', nn.initializers.zeros, (K, H)).astype(v.dtype).reshape(-1)
    q_BTNH, k_BSKH, v_BSKH = (constrain(x.reshape(B, T, -1, H), 'B.N.') for x in (q, k, v))
    if c.qk_norm:
      q_BTNH = rms_norm(q_BTNH, self.param('q_norm', nn.initializers.ones, (H,)), c.rms_norm_eps)
      k_BSKH = rms_norm(k_BSKH, self.param('k_norm', nn.initializers.ones, (H,)), c.rms_norm_eps)
    q_BTNH, k_BSKH = apply_rope(q_BTNH, *rope), apply_rope(k_BSKH, *rope)
    k_BKTH, v_BKTH = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    if before_BS is None:
      mixed_BTNH = causal_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    else:
      cache: tuple[jax.Array, jax.Array]
      cache = self.get_variable('cache', 'k_cache'), self.get_variable('cache', 'v_cache')
      mixed_BTNH = cached_attention(q_BTNH, k_BKTH, v_BKTH, *cache, before_BS)
    if self.is_mutable_collection('cache'):
      self.put_variable('cache', 'k_cache', k_BKTH)
      self.put_variable('cache', 'v_cache', v_BKTH)
    mixed_TC = mixed_BTNH.reshape(B * T, -1)
    self.sow('intermediates', 'inputs', mixed_TC)  # does nothing unless collected
    if is_single_row(mixed_TC):
      # Padded to two rows: for one row XLA fuses the head axes into the product and takes five times as long.
      mixed_TC = jnp.pad(mixed_TC, ((0, 1), (0, 0)))
    out_TD = product(mixed_TC, o_DKGH.reshape(D, -1))[: B * T]
    if c.o_bias:
      out_TD += self.param('o_bias', nn.initializers.zeros, (D,)).astype(out_TD.dtype)
    return out_TD.reshape(B, T, D)


class Mlp(nn.Module):
  """Gated MLP: down(silu(gate x) * up x) (Shazeer, arXiv 2002.05202), optionally + a bias."""

  config: ModelConfig
  shape: LayerShape

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D, F = self.config.hidden_size, self.shape.ffn
    gate_FD = self.param('gate', _init, (F, D))
    up_FD = self.param('up', _init, (F, D))
    down_DF = self.param('down', _init, (D, F))
    x_TD = x_BTD.reshape(-1, D)
    hidden_TF = constrain(jax.nn.silu(project(x_TD, gate_FD, D)) * project(x_TD, up_FD, D), 'BF')
    self.sow('intermediates', 'inputs', hidden_TF)
    out_TD = project(hidden_TF, down_DF, F)
    if self.config.output_bias:
      out_TD += self.param('down_bias', nn.initializers.zeros, (D,)).astype(out_TD.dtype)
    return out_TD.reshape(x_BTD.shape)


class DecoderLayer(nn.Module):
  """Pre-norm residual layer: x + attention(norm x), then + mlp(norm x).

  Applied functionally: `DecoderLayer(config, shape).apply({'params': p}, x_BTD, rope)`
  gives the layer's output [B, T, D], residual included; `method='attend'` and then `method='feed'`
  give its two halves. Flax raises `ScopeParamShapeError` if a parameter does not have the shape
  given by `shape`. In a sliced model, x is multiplied by a matrix in both residual connections, and the norms
  have no gains.
  """

  config: ModelConfig
  shape: LayerShape

  def setup(self) -> None:
    D, ones = self.config.hidden_size, nn.initializers.ones
    if self.config.sliced_from:
      self.attention_shortcut = self.param('attention_shortcut', _init, (D, D))
      self.mlp_shortcut = self.param('mlp_shortcut', _init, (D, D))
    else:
      self.attention_norm = self.param('attention_norm', ones, (D,))
      self.mlp_norm = self.param('mlp_norm', ones, (D,))
    self.attention = Attention(self.config, self.shape)
    self.mlp = Mlp(self.config, self.shape)

  def attend(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments_BT: jax.Array | None = None,
    before_BS: jax.Array | None = None,
  ) -> jax.Array:
    past_BTD, normed_BTD = self._split(x_BTD, 'attention')
    return constrain(past_BTD + self.attention(normed_BTD, rope, segments_BT, before_BS), 'B..')

  def feed(self, x_BTD: jax.Array) -> jax.Array:
    past_BTD, normed_BTD = self._split(x_BTD, 'mlp')
    return constrain(past_BTD + self.mlp(normed_BTD), 'B..')

  def _split(self, x_BTD: jax.Array, block: str) -> tuple[jax.Array, jax.Array]:
    """The residual that bypasses a block, and the input of the block."""
    D, eps, width = self.config.hidden_size, self.config.rms_norm_eps, self.config.sliced_from
    if not width:
      return x_BTD, rms_norm(x_BTD, getattr(self, f'{block}_norm'), eps)
    past_TD = project(x_BTD.reshape(-1, D), getattr(self, f'{block}_shortcut'), D)
    return past_TD.reshape(x_BTD.shape), sliced_norm(x_BTD, width, eps)

  def __call__(
    self,
    x_BTD: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segments_BT: jax.Array | None = None,
    before_BS: jax.Array | None = None,
  ) -> jax.Array:
    return self.feed(self.attend(x_BTD, rope, segments_BT, before_BS))
