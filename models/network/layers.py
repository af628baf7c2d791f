"""Flax modules of one decoder layer.

Weights keep Hugging Face's element order, with separate head axes: a KV group
is an index along K, an MLP channel is an index along F, and loading or saving
is a reshape. Matrix products run on flattened tokens: XLA's CPU backend takes
twice as long for the gradient of a product with a three-dimensional activation.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.network.attention import Logits, cached_attention, causal_attention
from adapt_jax.models.network.matmul import is_single_row, product
from adapt_jax.models.network.positions import Positions
from adapt_jax.models.network.rope import apply_rope
from adapt_jax.models.network.sharding import constrain

_init = nn.initializers.normal(0.02)
_ACTIVATIONS: dict[str, Any] = {
  'silu': jax.nn.silu,
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
}


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
  """Root-mean-square norm over the last axis (Zhang and Sennrich, arXiv 1910.07467), in fp32.

  Multiplies by weight + offset.
  """
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  gains = weight.astype(jnp.float32)
  return (x32 * scale * (gains + offset if offset else gains)).astype(x.dtype)


def sliced_norm(x: jax.Array, width: int, eps: float) -> jax.Array:
  """RMS norm without gains of a vector sliced from `width` numbers; the removed numbers count as zeros."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.sum(jnp.square(x32), axis=-1, keepdims=True) / width + eps)
  return (x32 * scale).astype(x.dtype)


def project(x_TD: jax.Array, weight: jax.Array, inputs: int) -> jax.Array:
  """x [T, inputs] times a weight stored as [out, in], with its axes flattened to two."""
  return product(x_TD, weight.reshape(-1, inputs))


def add_bias(x_TD: jax.Array, bias: jax.Array) -> jax.Array:
  """x [T, D] + a bias of D numbers, added in fp32, so that its gradient is summed over the tokens in fp32."""
  return (x_TD.astype(jnp.float32) + bias.astype(jnp.float32).reshape(-1)).astype(x_TD.dtype)


class Attention(nn.Module):
  """Causal grouped-query attention; optional rotary positions, window, biases, QK norm and bounded logits.

  With `before_BS`, x has one token per row, which attends to itself and to the given slots of `k_cache` and
  `v_cache` [B, K, S, H] in the collection `cache`. If it is mutable, x's own keys and values replace them.
  """

  config: ModelConfig
  shape: LayerShape

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    positions: Positions,
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
      q = add_bias(q, self.param('q_bias', nn.initializers.zeros, (K, G, H)))
      k = add_bias(k, self.param('k_bias', nn.initializers.zeros, (K, H)))
      v = add_bias(v, self.param('v_bias', nn.initializers.zeros, (K, H)))
    if c.qk_norm and c.traits.joint_qk_norm:
      q, k = self._norm('q_norm', q), self._norm('k_norm', k)
    q_BTNH, k_BSKH, v_BSKH = (constrain(x.reshape(B, T, -1, H), 'B.N.') for x in (q, k, v))
    if c.qk_norm and not c.traits.joint_qk_norm:
      q_BTNH, k_BSKH = self._norm('q_norm', q_BTNH), self._norm('k_norm', k_BSKH)
    if positions.cos is not None and positions.sin is not None:
      q_BTNH, k_BSKH = (apply_rope(x, positions.cos, positions.sin) for x in (q_BTNH, k_BSKH))
    k_BKTH, v_BKTH = (x.transpose(0, 2, 1, 3) for x in (k_BSKH, v_BSKH))
    form = Logits(c.attention_factor, c.attention_cap)
    if before_BS is None:
      mixed_BTNH = causal_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT, form, positions.window)
    else:
      cache: tuple[jax.Array, jax.Array]
      cache = self.get_variable('cache', 'k_cache'), self.get_variable('cache', 'v_cache')
      mixed_BTNH = cached_attention(q_BTNH, k_BKTH, v_BKTH, *cache, before_BS, form)
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
      out_TD = add_bias(out_TD, self.param('o_bias', nn.initializers.zeros, (D,)))
    return out_TD.reshape(B, T, D)

  def _norm(self, name: str, x: jax.Array) -> jax.Array:
    return rms_norm(
      x, norm_weight(self, name, x.shape[-1]), self.config.rms_norm_eps, self.config.norm_offset
    )


def norm_weight(module: nn.Module, name: str, size: int) -> jax.Array:
  """The weight of a norm, which starts as one that changes nothing."""
  offset = module.config.norm_offset
  weight: jax.Array = module.param(name, nn.initializers.constant(1 - offset), (size,))
  return weight


class Mlp(nn.Module):
  """Gated MLP with SiLU or GELU: down(act(gate x) * up x) (Shazeer, arXiv 2002.05202), + a bias if asked."""

  config: ModelConfig
  shape: LayerShape

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D, F = self.config.hidden_size, self.shape.ffn
    gate_FD = self.param('gate', _init, (F, D))
    up_FD = self.param('up', _init, (F, D))
    down_DF = self.param('down', _init, (D, F))
    x_TD = x_BTD.reshape(-1, D)
    activation = _ACTIVATIONS[self.config.traits.activation]
    hidden_TF = constrain(activation(project(x_TD, gate_FD, D)) * project(x_TD, up_FD, D), 'BF')
    self.sow('intermediates', 'inputs', hidden_TF)
    out_TD = project(hidden_TF, down_DF, F)
    if self.config.output_bias:
      out_TD = add_bias(out_TD, self.param('down_bias', nn.initializers.zeros, (D,)))
    return out_TD.reshape(x_BTD.shape)


class DecoderLayer(nn.Module):
  """Residual layer: x + attention(norm x), then + mlp(norm x); some families norm the outputs too.

  Applied functionally: `DecoderLayer(config, shape).apply({'params': p}, x_BTD, positions)`
  gives the layer's output [B, T, D], residual included. Each half of it adds the `output` of a block,
  'attention' or 'mlp', to the residual stream. Flax raises `ScopeParamShapeError` if a parameter does not
  have the shape given by `shape`.
  In a sliced model, x is multiplied by a matrix in both residual connections, and the norms have no gains.
  """

  config: ModelConfig
  shape: LayerShape

  def setup(self) -> None:
    D, traits = self.config.hidden_size, self.config.traits
    if self.config.sliced_from:
      self.attention_shortcut = self.param('attention_shortcut', _init, (D, D))
      self.mlp_shortcut = self.param('mlp_shortcut', _init, (D, D))
    elif traits.pre_norm:
      self.attention_norm, self.mlp_norm = (norm_weight(self, f'{b}_norm', D) for b in ('attention', 'mlp'))
    if traits.post_norm:
      self.attention_post_norm = norm_weight(self, 'attention_post_norm', D)
      self.mlp_post_norm = norm_weight(self, 'mlp_post_norm', D)
    self.attention = Attention(self.config, self.shape)
    self.mlp = Mlp(self.config, self.shape)

  def output(self, block: str, x_BTD: jax.Array, *args: Any) -> jax.Array:
    """The output of o_proj or down_proj for the residual stream x; `args` are `Attention`'s."""
    out_BTD: jax.Array = getattr(self, block)(self._normed(block, x_BTD), *args)
    return out_BTD

  def add(self, block: str, x_BTD: jax.Array, out_BTD: jax.Array) -> jax.Array:
    """The residual stream after a block, from the stream before it and the output of its last projection."""
    c = self.config
    if c.sliced_from:
      x_TD = project(x_BTD.reshape(-1, c.hidden_size), getattr(self, f'{block}_shortcut'), c.hidden_size)
      x_BTD = x_TD.reshape(x_BTD.shape)
    if c.traits.post_norm:
      out_BTD = rms_norm(out_BTD, getattr(self, f'{block}_post_norm'), c.rms_norm_eps, c.norm_offset)
    if c.residual_scale != 1:
      out_BTD *= c.residual_scale
    return constrain(x_BTD + out_BTD, 'B..')

  def _normed(self, block: str, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    if c.sliced_from:
      return sliced_norm(x_BTD, c.sliced_from, c.rms_norm_eps)
    if not c.traits.pre_norm:
      return x_BTD
    return rms_norm(x_BTD, getattr(self, f'{block}_norm'), c.rms_norm_eps, c.norm_offset)

  def __call__(
    self,
    x_BTD: jax.Array,
    positions: Positions,
    segments_BT: jax.Array | None = None,
    before_BS: jax.Array | None = None,
  ) -> jax.Array:
    out_BTD = self.output('attention', x_BTD, positions, segments_BT, before_BS)
    x_BTD = self.add('attention', x_BTD, out_BTD)
    return self.add('mlp', x_BTD, self.output('mlp', x_BTD))
