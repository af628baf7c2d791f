"""Pads every layer with zeros to the widest one, so that stock classes compute the same function."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network.llama import Params


def padded_config(config: ModelConfig) -> ModelConfig:
  """The uniform config that fits all layers and that a stock class supports.

  Some stock classes, such as Llama's, refuse heads that do not divide the hidden size: KV groups are added up
  to a number that does, and if there is none, another class is used that computes the same function.

  Raises InputError if no stock class has the model's biases or its sliced residual stream.
  """
  if config.sliced_from:
    raise InputError(
      "config.export.formats has 'hf_padded', but no stock class supports SliceGPT: leave it out"
    )
  if config.output_bias:
    raise InputError(
      "config.export.formats has 'hf_padded', but no stock class has the biases of o_proj and down_proj that "
      "this model has or config.prune.compensate = 'bias' adds: leave 'hf_padded' out"
    )
  group = max(s.group_size for s in config.layers)
  kv_heads, ffn = max(s.num_kv_heads for s in config.layers), max(s.ffn for s in config.layers)
  family = config.family
  if config.traits.heads_divide:
    dividing = [n for n in range(kv_heads, 2 * kv_heads + 1) if config.hidden_size % (n * group) == 0]
    if dividing:
      kv_heads = dividing[0]
    elif config.qkv_bias or not config.traits.padded_as:
      raise InputError(
        f"config.export.formats has 'hf_padded', but stock {config.traits.stock} refuses {kv_heads * group} "
        f'heads at hidden size {config.hidden_size}, and no other class computes the model: leave '
        f"'hf_padded' out"
      )
    else:
      family = config.traits.padded_as
  uniform = tuple(
    dataclasses.replace(shape, num_heads=kv_heads * group, num_kv_heads=kv_heads, ffn=ffn)
    for shape in config.layers
  )
  return dataclasses.replace(config.with_layers(uniform), family=family)


def pad(config: ModelConfig, params: Params) -> Params:
  """The parameters of `padded_config`: all added entries are zeros, including o_proj's columns."""
  shape = padded_config(config).layers[0]
  widths = {'K': shape.num_kv_heads, 'G': shape.group_size, 'F': shape.ffn}

  def widen(layer: Params) -> Params:
    out = dict(layer)
    for block, axes in _AXES.items():
      out[block] = {n: _widen(x, axes.get(n, ''), widths) for n, x in layer[block].items()}
    return out

  return params | {'layers': [widen(layer) for layer in params['layers']]}


# Leaf -> its axes in order; axes that may grow have a letter.
_AXES = {
  'attention': {'q': 'KG', 'k': 'K', 'v': 'K', 'o': '.KG', 'q_bias': 'KG', 'k_bias': 'K', 'v_bias': 'K'},
  'mlp': {'gate': 'F', 'up': 'F', 'down': '.F'},
}


def _widen(x: Any, axes: str, widths: dict[str, int]) -> Any:
  grow = [(0, widths.get(letter, size) - size) for letter, size in zip(axes, x.shape, strict=False)]
  grow += [(0, 0)] * (x.ndim - len(grow))
  return x if not any(after for _, after in grow) else jnp.pad(x, grow)
