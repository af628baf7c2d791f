"""GGUF input: the config and, by Hugging Face name and layout, the weights of a .gguf file."""

import os
import re
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, dequantize

from models.config import LayerShape, Llama3Scaling, ModelConfig, RopeConfig
from models.errors import InputError
from models.gguf_file import TENSOR_TYPES, GgufFile, open_file
from models.rope import inverse_frequencies

# Architectures whose function this decoder computes; Mistral models say llama.
_ARCHITECTURES = ('llama', 'qwen2', 'qwen3')
_ROPE_FREQS = 'rope_freqs.weight'
_TOP_NAMES = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}
_LAYER_NAMES = {
  'attn_norm.weight': 'input_layernorm.weight',
  'attn_q.weight': 'self_attn.q_proj.weight',
  'attn_k.weight': 'self_attn.k_proj.weight',
  'attn_v.weight': 'self_attn.v_proj.weight',
  'attn_output.weight': 'self_attn.o_proj.weight',
  'attn_q.bias': 'self_attn.q_proj.bias',
  'attn_k.bias': 'self_attn.k_proj.bias',
  'attn_v.bias': 'self_attn.v_proj.bias',
  'attn_output.bias': 'self_attn.o_proj.bias',
  'attn_q_norm.weight': 'self_attn.q_norm.weight',
  'attn_k_norm.weight': 'self_attn.k_norm.weight',
  'ffn_norm.weight': 'post_attention_layernorm.weight',
  'ffn_gate.weight': 'mlp.gate_proj.weight',
  'ffn_up.weight': 'mlp.up_proj.weight',
  'ffn_down.weight': 'mlp.down_proj.weight',
}
_PERMUTED = ('q_proj.weight', 'k_proj.weight', 'q_proj.bias', 'k_proj.bias')

_STORED_DTYPES = {
  GGMLQuantizationType.F32: np.dtype(np.float32),
  GGMLQuantizationType.F16: np.dtype(np.float16),
  GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
  """The ModelConfig that the metadata and tensor names describe.

  Raises InputError for a missing, corrupt or truncated file, and by name for whatever this decoder
  would compute wrongly: other architectures, experts, other rotary scalings, sliding windows.
  """
  file = open_file(path)
  arch = _architecture(file)
  _refuse_unsupported(file, arch)
  embedding = file.tensors.get('token_embd.weight')
  if embedding is None:
    raise InputError(f'{file.path}: no tensor token_embd.weight: a file of the whole model is needed')
  vocab_size = embedding.shape[0]
  tokens = len(file.array('tokenizer.ggml.tokens', str, []))
  if tokens > vocab_size:
    raise InputError(
      f'{file.path}: tokenizer.ggml.tokens has {tokens} entries, token_embd.weight only {vocab_size} '
      f'rows: tokenizer and weights do not belong together'
    )
  biased = 'blk.0.attn_q.bias' in file.tensors
  return ModelConfig(
    # A llama with biases on q, k and v, but not on o, is what Hugging Face calls qwen2.
    family='qwen2' if biased and 'blk.0.attn_output.bias' not in file.tensors and arch == 'llama' else arch,
    vocab_size=vocab_size,
    hidden_size=file.field(f'{arch}.embedding_length', int),
    head_dim=_head_dim(file, arch),
    layers=_layers(file, arch),
    rope=_rope(file, arch),
    rms_norm_eps=file.field(f'{arch}.attention.layer_norm_rms_epsilon', float),
    tie_embeddings='output.weight' not in file.tensors,
    qkv_bias=biased,
    qk_norm='blk.0.attn_q_norm.weight' in file.tensors,
    max_position=file.field(f'{arch}.context_length', int),
  )


def _architecture(file: GgufFile) -> str:
  arch = file.field('general.architecture', str)
  if arch not in _ARCHITECTURES:
    raise InputError(
      f'{file.path}: general.architecture {arch!r} is not supported: one of {", ".join(_ARCHITECTURES)}'
    )
  return arch


def _refuse_unsupported(file: GgufFile, arch: str) -> None:
  def get(key: str, kind: type, default: Any) -> Any:
    return file.field(f'{arch}.{key}', kind, default)

  head_dim = _head_dim(file, arch)
  window = get('attention.sliding_window', int, 0)
  refused = {
    'expert_count': get('expert_count', int, 0) > 0,
    'rope.scaling.type': get('rope.scaling.type', str, 'none') != 'none',
    'rope.scale_linear': get('rope.scale_linear', float, 1.0) != 1.0,
    'rope.dimension_count': get('rope.dimension_count', int, head_dim) != head_dim,
    'attention.value_length': get('attention.value_length', int, head_dim) != head_dim,
    'attention.sliding_window': 0 < window < get('context_length', int, 0),
    'attention.causal': not get('attention.causal', bool, True),
  }
  for key, found in refused.items():
    if found:
      raise InputError(
        f'{file.path}: {arch}.{key} = {file.metadata[f"{arch}.{key}"]!r} is not supported; use a model '
        f'without it'
      )


def _per_layer(file: GgufFile, arch: str, key: str) -> list[int]:
  """A width of each layer, stored once for all layers or as an array."""
  key = f'{arch}.{key}'
  depth = file.field(f'{arch}.block_count', int)
  if not 0 < depth <= len(file.tensors):
    raise InputError(f'{file.path}: {arch}.block_count = {depth} does not fit {len(file.tensors)} tensors')
  value = file.metadata.get(key)
  values = file.array(key, int) if isinstance(value, list) else [file.field(key, int)] * depth
  if len(values) != depth or min(values) < 1:
    raise InputError(f'{file.path}: {key} = {value} should be one width of at least 1 for {depth} layers')
  return values


def _layers(file: GgufFile, arch: str) -> tuple[LayerShape, ...]:
  heads = kv_heads = _per_layer(file, arch, 'attention.head_count')
  if f'{arch}.attention.head_count_kv' in file.metadata:
    kv_heads = _per_layer(file, arch, 'attention.head_count_kv')
  widths = _per_layer(file, arch, 'feed_forward_length')
  try:
    return tuple(LayerShape(*layer) for layer in zip(heads, kv_heads, widths, strict=True))
  except InputError as error:
    raise InputError(f'{file.path}: {error}: convert the model again') from None


def _head_dim(file: GgufFile, arch: str) -> int:
  head_dim = file.field(f'{arch}.attention.key_length', int, 0)
  head_dim = head_dim or file.field(f'{arch}.rope.dimension_count', int, 0)
  if not head_dim:
    hidden = file.field(f'{arch}.embedding_length', int)
    head_dim = hidden // _per_layer(file, arch, 'attention.head_count')[0]
  if head_dim < 2 or head_dim % 2:
    raise InputError(f'{file.path}: a head dimension of {head_dim} is not supported: it should be even')
  return head_dim


def _rope(file: GgufFile, arch: str) -> RopeConfig:
  """Base frequency, and the llama3 scaling recovered from the divisors in rope_freqs.weight."""
  rope = RopeConfig(float(file.field(f'{arch}.rope.freq_base', float, 10000.0)))
  if _ROPE_FREQS not in file.tensors:
    return rope
  head_dim = _head_dim(file, arch)
  divisors = _read_array(file, _ROPE_FREQS)
  # The longest wavelengths are divided by `factor`; LLaMA 3.1 and 3.2 differ in nothing else.
  scaled = RopeConfig(rope.theta, Llama3Scaling(float(divisors.max(initial=1.0)), 1.0, 4.0, 8192))
  expected = inverse_frequencies(rope, head_dim) / inverse_frequencies(scaled, head_dim)
  if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3, atol=0):
    raise InputError(
      f'{file.path}: {_ROPE_FREQS} is not the llama3 rotary scaling with low_freq_factor 1, '
      f'high_freq_factor 4 and original length 8192: use the Hugging Face checkpoint'
    )
  return scaled


def _type(file: GgufFile, name: str) -> GGMLQuantizationType:
  """The type of a tensor by GGUF name; InputError if it is not supported."""
  number = file.tensors[name].type
  if number in TENSOR_TYPES:
    return TENSOR_TYPES[number]
  try:
    found = GGMLQuantizationType(number).name
  except ValueError:
    found = f'number {number}'
  raise InputError(
    f'{file.path}: tensor {name!r} has type {found}, which is not supported: use a file of '
    f'{", ".join(kind.name for kind in TENSOR_TYPES.values())} tensors'
  )


def _read_array(file: GgufFile, name: str) -> np.ndarray:
  """One tensor by GGUF name: float32 for F32 and the quantised types, else as stored."""
  kind, tensor = _type(file, name), file.tensors[name]
  # A plain read: pages of a mapped file would count as this process's memory.
  raw = np.fromfile(file.path, np.uint8, tensor.nbytes, offset=tensor.offset)
  if kind in _STORED_DTYPES:
    return raw.view(_STORED_DTYPES[kind]).reshape(tensor.shape)
  return dequantize(raw.reshape(*tensor.shape[:-1], -1), kind)


class GgufReader:
  """The weights of a .gguf file by Hugging Face name, each read from disk when asked for."""

  def __init__(self, path: str | os.PathLike[str]):
    self.where = str(path)
    self._file = open_file(path)
    arch = _architecture(self._file)
    # llama.cpp rotates neighbouring pairs in its llama graph, so its converter interleaves each
    # head's halves; the qwen graphs rotate halves as Hugging Face does.
    self._permuted_head = _head_dim(self._file, arch) if arch == 'llama' else None
    self._gguf_name = {}
    for name in self._file.tensors:
      _type(self._file, name)  # refuses before anything is read
      if name != _ROPE_FREQS:
        self._gguf_name[_hf_name(self._file, name)] = name

  def names(self) -> set[str]:
    """Hugging Face names of all tensors."""
    return set(self._gguf_name)

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape as `read` gives it: [out, in] for matrices."""
    return self._file.tensors[self._gguf_name[name]].shape

  def dtype(self, name: str) -> str:
    """Numpy name of the dtype that `read` gives; InputError if the stored type is not supported."""
    return _STORED_DTYPES.get(_type(self._file, self._gguf_name[name]), np.dtype(np.float32)).name

  def read(self, name: str) -> np.ndarray:
    """One tensor in Hugging Face's layout; float32 unless stored as F16 or BF16."""
    array = _read_array(self._file, self._gguf_name[name])
    if self._permuted_head and name.endswith(_PERMUTED):
      half = self._permuted_head // 2
      pairs = array.reshape(-1, half, 2, *array.shape[1:])
      return pairs.swapaxes(1, 2).reshape(array.shape)
    return array


def _hf_name(file: GgufFile, name: str) -> str:
  layer = re.fullmatch(r'blk\.(\d+)\.(.+)', name)
  if layer and layer[2] in _LAYER_NAMES:
    return f'model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}'
  if name not in _TOP_NAMES:
    raise InputError(f'{file.path}: tensor {name!r} is unknown: the model has unsupported parts')
  return _TOP_NAMES[name]


def open_tensors(path: str | os.PathLike[str]) -> GgufReader:
  """Opens the weights without reading any.

  Raises InputError for a missing, corrupt or truncated file, an unsupported architecture, and by
  name for a tensor that is unknown or has an unsupported type.
  """
  return GgufReader(path)
