"""Pads every layer with zeros to the widest one, for programs that need layers of equal widths."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network.llama import Params


def widest_config(config: ModelConfig) -> ModelConfig:
  """The uniform config whose layers all have the largest widths of any layer."""
  group = max(s.group_size for s in config.layers)
  kv_heads, ffn = max(s.num_kv_heads for s in config.layers), max(s.ffn for s in config.layers)
  return _with_widths(config, kv_heads, group, ffn)


def _with_widths(config: ModelConfig, kv_heads: int, group: int, ffn: int) -> ModelConfig:
  def wide(shape: LayerShape) -> LayerShape:
    return dataclasses.replace(shape, num_heads=kv_heads * group, num_kv_heads=kv_heads, ffn=ffn)

  return config.with_layers(tuple(wide(shape) for shape in config.layers))


def padded_config(config: ModelConfig) -> ModelConfig:
  """The uniform config that fits all layers and that a stock class of transformers supports.

  Some stock classes, such as Llama's, refuse heads that do not divide the hidden size: KV groups are added
  up to a number that does. If there is none, another class is used that computes the same function, or else
  query heads are added too.

  Raises InputError if no stock class has the model's biases or its sliced residual stream.
  """
  refused = 'a stream sliced by SliceGPT' if config.sliced_from else ''
  if config.output_bias:
    refused = "biases of o_proj and down_proj, which this model has or prune.compensate = 'bias' adds"
  shape, family = widest_config(config).layers[0], config.family
  kv_heads, group = shape.num_kv_heads, shape.group_size
  if config.traits.heads_divide and not refused:

    def dividing(group: int) -> list[int]:
      return [n for n in range(kv_heads, 2 * kv_heads + 1) if config.hidden_size % (n * group) == 0]

    wider = [(n * g, g, n) for g in range(group, 2 * group + 1) for n in dividing(g)]
    if found := dividing(group):
      kv_heads = found[0]
    elif config.traits.padded_as and not config.qkv_bias:
      family = config.traits.padded_as
    elif wider:
      _, group, kv_heads = min(wider)
    else:
      refused = f'{kv_heads * group} heads at hidden size {config.hidden_size}'
  if refused:
    raise InputError(f'no stock class of transformers supports {refused}: leave it out')
  return dataclasses.replace(_with_widths(config, kv_heads, group, shape.ffn), family=family)


def pad(wide: ModelConfig, params: Params) -> Params:
  """The parameters at the widths of a uniform config; added entries, o_proj's columns too, are zeros."""
  shape = wide.layers[0]
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
