"""What distinguishes each model family from Llama, in one place: an entry of `FAMILIES` for each.

A family is an architecture of Hugging Face. Its entry describes the layers, config.json and the
export formats; the defaults of `Family` are Llama's. All other modules read these fields.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """One architecture.

  Names:
    stock: the classes of transformers are {stock}Config, {stock}Model and {stock}ForCausalLM.
    aliases: other values of `model_type` in config.json for models that compute the same function.

  The layers:
    qkv_bias: whether q, k and v have biases: 'never', 'always', or 'optional' by the field `attention_bias`;
      if optional, o has one too.
    qk_norm: whether queries and keys are normed, each head by itself.

  config.json:
    defaults: transformers' values of fields that a file leaves out, where they are not Llama's.
    constants: fields that are written in addition, always with these values.
    optional_window: whether `sliding_window` counts only if `use_sliding_window` is set.

  Exports:
    heads_divide: whether the stock class requires that the heads divide hidden_size.
    padded_as: a family of the same function without that requirement; '' if there is none.
    gguf: llama.cpp's architecture if all layers are equally wide.
    mlx: what the stock model of MLX-LM does not support: 'head_dim' (other than hidden_size / heads) or
      'biases'; '' if it supports all.
  """

  stock: str
  aliases: tuple[str, ...] = ()
  qkv_bias: str = 'never'
  qk_norm: bool = False
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  optional_window: bool = True
  heads_divide: bool = False
  padded_as: str = ''
  gguf: str = 'llama'
  mlx: str = ''


# The key is `model_type` in config.json, and `ModelConfig.family`.
FAMILIES = {
  # Also SmolLM2 and DeepSeek-R1 distillations.
  'llama': Family(
    'Llama', aliases=('mobilellm',), qkv_bias='optional', heads_divide=True, padded_as='mistral'
  ),
  'mistral': Family('Mistral', constants={'sliding_window': None}, optional_window=False),
  'qwen2': Family(
    'Qwen2', qkv_bias='always', constants={'use_sliding_window': False}, gguf='qwen2', mlx='head_dim'
  ),
  'qwen3': Family(
    'Qwen3',
    qkv_bias='optional',
    qk_norm=True,
    defaults={'head_dim': 128},
    constants={'use_sliding_window': False},
    gguf='qwen3',
    mlx='biases',
  ),
}  # fmt: skip
