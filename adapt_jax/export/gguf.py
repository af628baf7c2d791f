"""Writes a model as a .gguf file for llama.cpp and programs built on it.

llama.cpp's architectures assume that all layers have the widths of the first; only its `deci`, made for
Nemotron-51B, supports per-layer widths, of a llama, including biases.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from gguf import (
  GGMLQuantizationType,
  GGUFWriter,
  LlamaFileType,
  RopeScalingType,
  quant_shape_to_byte_shape,
  quantize,
)

from adapt_jax.config.values import GGUF_BLOCK
from adapt_jax.export.float16 import check_range
from adapt_jax.export.gguf_vocab import add_tokenizer, check_gguf_tokenizer
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import LinearScaling, Llama3Scaling, ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import new_file
from adapt_jax.models.formats.gguf_architectures import ARCHITECTURES
from adapt_jax.models.formats.gguf_model import (
  FAMILY_KEY,
  PERMUTED,
  ROPE_FREQS,
  SCALING_KEY,
  STORED_DTYPES,
  rope_divisors,
)
from adapt_jax.models.formats.hf_weights import Leaf, host_tensors, leaves
from adapt_jax.models.network.llama import Params

KINDS = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0')
_QUANTISED = ('Q8_0', 'Q4_0')
_VARIED = 'widths that differ by layer'


def check_gguf(config: ModelConfig) -> None:
  """Raises InputError if llama.cpp has no architecture that computes this model."""
  _architecture(config)


def write_gguf(
  config: ModelConfig,
  params: Params,
  path: str | pathlib.Path,
  *,
  tokenizer: Any,
  kind: str,
  name: str,
) -> None:
  """Writes weights, config and tokenizer as one .gguf file, a tensor at a time.

  `kind`, one of `KINDS`, is the type of the matrices; vectors are F32. In Q8_0 and Q4_0 files,
  matrices whose rows are not whole blocks of 32 weights are F16. As in llama.cpp's own quantiser, Q4_0 files
  store the output projection, or the tied embedding, in eight bits. Programs show `name` as the model's name.

  The write is atomic: an existing file is replaced at the end; an error leaves it unchanged. Every process
  must call this, since parameters may be sharded over processes; the first one writes.

  Raises InputError for a model (`check_gguf`) or tokenizer (`check_gguf_tokenizer`) that llama.cpp would
  compute differently, and for a weight beyond the range of F16.
  """
  arch = _architecture(config)
  check_gguf_tokenizer(tokenizer)
  types = {leaf.name: _stored_type(config, leaf, kind) for leaf in leaves(config)}
  halves = [leaf for leaf in leaves(config) if types[leaf.name] == GGMLQuantizationType.F16]
  check_range(params, halves, 'choose BF16 or F32 in export.gguf_types')
  if jax.process_index() != 0:
    for _ in host_tensors(config, params):
      pass
    return
  with new_file(path) as beside:
    writer = GGUFWriter(beside, arch)
    try:
      _add_fields(writer, config, kind, name)
      add_tokenizer(writer, tokenizer, config.vocab_size)
      _write(writer, config, params, types, pathlib.Path(path).name)
    finally:
      writer.close()


def _architecture(config: ModelConfig) -> str:
  """The architecture of llama.cpp that computes this model. Raises InputError if there is none."""
  if refused := next((what for what, refused in _lacking(config).items() if refused), ''):
    padded = ', or as gguf_padded' if refused == _VARIED else ''
    raise InputError(
      f'a .gguf file cannot hold a {config.family} model with {refused}: export it as hf or '
      f'hf_padded{padded} instead'
    )
  name = config.traits.gguf
  if not config.traits.gguf_varied:
    return name
  if not config.uniform:
    return 'deci'
  # llama.cpp's qwen2 has no bias on down_proj and no llama3 scaling, and in older versions its heads must add
  # up to the hidden size; its llama computes the same function with all of these, with q and k permuted.
  plain = config.qkv_bias and not config.output_bias and not _has_llama3_scaling(config)
  return name if plain and _square(config) else 'llama'


def _lacking(config: ModelConfig) -> dict[str, bool]:
  """What the architecture of the family cannot compute -> whether the model has it."""
  name, arch = config.traits.gguf, ARCHITECTURES[config.traits.gguf]
  sliced = {'a stream sliced by SliceGPT': bool(config.sliced_from)}
  if config.traits.gguf_varied:
    return sliced | {'sliding windows': any(shape.window for shape in config.layers)}
  fixed = arch.implied(config, max(shape.window for shape in config.layers))
  lacking = sliced | {
    _VARIED: not config.uniform,
    'biases': (config.qkv_bias or config.output_bias) and not arch.biases,
    'llama3 rotary scaling': _has_llama3_scaling(config),
    'a head of its own': arch.tied is True and not config.tie_embeddings,
    'tied embeddings': arch.tied is False and config.tie_embeddings,
    'heads that do not add up to the hidden size': arch.square and not _square(config),
    'logits without caps': 'logit_cap' in arch.numbers and not (config.attention_cap and config.logit_cap),
    'no sliding window': arch.window_every > 0 and not any(shape.window for shape in config.layers),
    f"windows or rotary embeddings in other layers than llama.cpp's {name}": config.layers != fixed.layers,
  }
  for field in dataclasses.fields(fixed):
    here, there = getattr(config, field.name), getattr(fixed, field.name)
    if field.name != 'layers':
      lacking[f"{field.name} = {here}, which is {there} in llama.cpp's {name}"] = here != there
  return lacking


def _has_llama3_scaling(config: ModelConfig) -> bool:
  return isinstance(config.rope.scaling, Llama3Scaling)


def _square(config: ModelConfig) -> bool:
  return all(shape.num_heads * config.head_dim == config.hidden_size for shape in config.layers)


def _add_fields(writer: GGUFWriter, config: ModelConfig, kind: str, name: str) -> None:
  arch = ARCHITECTURES[writer.arch]

  def widths(attribute: str) -> int | list[int]:
    values = [getattr(shape, attribute) for shape in config.layers]
    return values if writer.arch == 'deci' else values[0]

  writer.add_type('model')
  writer.add_name(name)
  writer.add_file_type(LlamaFileType['ALL_F32' if kind == 'F32' else f'MOSTLY_{kind}'])
  if kind in _QUANTISED:
    writer.add_quantization_version(2)
  writer.add_vocab_size(config.vocab_size)
  writer.add_context_length(config.max_position)
  writer.add_embedding_length(config.hidden_size)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(widths('ffn'))
  writer.add_head_count(widths('num_heads'))
  writer.add_head_count_kv(widths('num_kv_heads'))
  # Without these llama.cpp divides the hidden size by the heads of the first layer.
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope.theta)
  writer.add_layer_norm_rms_eps(config.rms_norm_eps)
  if arch.window_every:
    writer.add_sliding_window(max(shape.window for shape in config.layers))
  for field, (key, _) in arch.numbers.items():
    writer.add_float32(f'{writer.arch}.{key}', getattr(config, field))
  writer.add_string(FAMILY_KEY, config.family)
  scaling = config.rope.scaling
  if isinstance(scaling, LinearScaling):
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(scaling.factor)
  elif scaling:
    parts = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position)
    writer.add_array(SCALING_KEY, [float(part) for part in parts])


def _write(
  writer: GGUFWriter,
  config: ModelConfig,
  params: Params,
  types: dict[str, GGMLQuantizationType],
  title: str,
) -> None:
  """Writes header, fields and tensors; GGUFWriter's own method holds all tensors, or a copy on disk."""
  arch = ARCHITECTURES[writer.arch]
  names = arch.gguf_names(config)
  for leaf in leaves(config):
    stored = types[leaf.name]
    nbytes = int(np.prod(quant_shape_to_byte_shape(leaf.hf_shape, stored)))
    writer.add_tensor_info(names[leaf.name], leaf.hf_shape, np.dtype(np.float32), nbytes, stored)
  divisors = rope_divisors(config.rope, config.head_dim) if _has_llama3_scaling(config) else None
  if divisors is not None:
    writer.add_tensor_info(ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  with Progress(title, len(types), 'tensors') as progress:
    for leaf, tensor in host_tensors(config, params):
      if arch.permuted and leaf.name.endswith(PERMUTED):
        tensor = _interleaved(tensor, config.head_dim)
      if config.norm_offset and leaf.name.endswith('norm.weight'):  # llama.cpp multiplies by the sum
        tensor = tensor.astype(np.float32) + np.float32(config.norm_offset)
      stored = types[leaf.name]
      plain = STORED_DTYPES.get(stored)
      _append(writer, tensor.astype(plain, copy=False) if plain else quantize(tensor, stored))
      del tensor  # free it before the next one is copied to the host
      progress.update(1)
  if divisors is not None:
    _append(writer, divisors)


def _stored_type(config: ModelConfig, leaf: Leaf, kind: str) -> GGMLQuantizationType:
  if len(leaf.hf_shape) == 1:
    return GGMLQuantizationType.F32
  if kind in _QUANTISED and leaf.hf_shape[1] % GGUF_BLOCK:
    return GGMLQuantizationType.F16
  head = 'model.embed_tokens.weight' if config.tie_embeddings else 'lm_head.weight'
  return GGMLQuantizationType['Q8_0' if kind == 'Q4_0' and leaf.name == head else kind]


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows of q or k with the two halves of each head interleaved: llama.cpp rotates neighbouring pairs."""
  halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def _append(writer: GGUFWriter, data: np.ndarray) -> None:
  """Appends a tensor's bytes; GGUFWriter's own `tofile` loses the system's message for a full disk."""
  assert writer.fout is not None  # the header has been written
  file = writer.fout[0]
  writer.write_padding(file, file.tell())
  file.write(np.ascontiguousarray(data).view(np.uint8).data)
  writer.write_padding(file, data.nbytes)
