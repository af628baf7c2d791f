"""Decoding with a KV cache: the layers of `models.network.llama`, applied to each token once.

A cache has for each layer {'k_cache': [B, K, S, H], 'v_cache': [B, K, S, H]} in the dtype of the activations,
with the K of that layer. KV heads come before slots, so that the products of a head read memory in order.

Prompts of different lengths are padded on the right. Causal attention does not see the padding, so that
a prefill is the forward pass of training, without masks. Decoded tokens are written to the slots from P on,
the padded length, at the same slot in all rows; the slots between a row's prompt and slot P are masked.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.layers import DecoderLayer
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.positions import PositionTables
from adapt_jax.models.network.sharding import constrain

Cache = list[dict[str, jax.Array]]


def prefill(
  config: ModelConfig,
  params: Params,
  tokens_BP: jax.Array,
  lengths_B: jax.Array,
  slots: int,
  *,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, Cache]:
  """Logits [B, V] in fp32 after each row's prompt, and a cache with room for `slots` tokens (P or more).

  Args:
    tokens_BP: prompts, padded on the right with any ids.
    lengths_B: tokens of each prompt, 1 or more.
  """
  B, P = tokens_BP.shape
  tables = llama.rope(config, P)
  cache: Cache = []

  def run(i: int, layer: Params, x_BTD: jax.Array) -> jax.Array:
    module: Any = DecoderLayer(config, config.layers[i])
    x_BTD, made = module.apply({'params': layer}, x_BTD, tables.of(i), mutable=['cache'])
    room = ((0, 0), (0, 0), (0, slots - P), (0, 0))
    cache.append({k: constrain(jnp.pad(v, room), 'BK..') for k, v in made['cache']['attention'].items()})
    return x_BTD

  x_BTD = llama.through_layers(config, params, llama.embed(config, params, tokens_BP, dtype), run)
  return llama.logits(config, params, x_BTD[jnp.arange(B), lengths_B - 1]), cache


def decode_step(
  config: ModelConfig,
  params: Params,
  cache: Cache,
  tokens_B: jax.Array,
  lengths_B: jax.Array,
  padded_length: int,
  step: jax.Array,
  *,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, Cache]:
  """Logits [B, V] in fp32 after one more token in every row, and the updated cache.

  Args:
    tokens_B: the tokens to continue from.
    lengths_B: tokens of each prompt.
    padded_length: P, the padded length of the prompts in `prefill`.
    step: the number of tokens decoded before these.
  """
  index = padded_length + step
  slots_S = jnp.arange(cache[0]['k_cache'].shape[2])
  before_BS = (slots_S < lengths_B[:, None]) | ((slots_S >= padded_length) & (slots_S < index))
  position_B1 = (lengths_B + step)[:, None]
  tables = PositionTables(config, position_B1)
  # Of the token in each slot: those after the prompts continue each row's own.
  of_slots_BS = jnp.where(slots_S < padded_length, slots_S, lengths_B[:, None] + slots_S - padded_length)
  new: Cache = []

  def run(i: int, layer: Params, x_BTD: jax.Array) -> jax.Array:
    module: Any = DecoderLayer(config, config.layers[i])
    variables, positions = {'params': layer, 'cache': {'attention': cache[i]}}, tables.of(i)
    seen_BS = before_BS
    if positions.window is not None:
      seen_BS &= position_B1 - of_slots_BS < positions.window
    x_BTD, changed = module.apply(variables, x_BTD, positions, before_BS=seen_BS, mutable=['cache'])
    new.append(changed['cache']['attention'])
    return x_BTD

  x_BTD = llama.through_layers(config, params, llama.embed(config, params, tokens_B[:, None], dtype), run)
  logits_BV = llama.logits(config, params, x_BTD[:, 0])
  return logits_BV, _write(cache, new, index, after=logits_BV[0, 0])


def _write(cache: Cache, new: Cache, index: jax.Array, after: jax.Array) -> Cache:
  """Returns the cache with the keys and values of one token per row written to slot `index`.

  XLA's CPU backend writes in place only if data dependencies put all reads first; otherwise it copies the
  whole cache several times per step. So the index is made to depend on `after`, which is never above ∞.
  """
  index = jnp.where(after > jnp.inf, 0, index)

  def write(old: jax.Array, token: jax.Array) -> jax.Array:
    return constrain(jax.lax.dynamic_update_slice_in_dim(old, token, index, axis=2), 'BK..')

  return jax.tree.map(write, cache, new)
