"""GGUF input: the config and, by Hugging Face name and layout, the weights of a .gguf file.

The header is parsed here, not by gguf.GGUFReader: that keeps a numpy view of every metadata string
(2 s and 160 MB for a vocabulary of 49k) and loops without bound over a corrupt array's length.
"""

import math
import mmap
import os
import pathlib
import re
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from models.config import LayerShape, Llama3Scaling, ModelConfig, RopeConfig
from models.errors import InputError
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
  'attn_q_norm.weight': 'self_attn.q_norm.weight',
  'attn_k_norm.weight': 'self_attn.k_norm.weight',
  'ffn_norm.weight': 'post_attention_layernorm.weight',
  'ffn_gate.weight': 'mlp.gate_proj.weight',
  'ffn_up.weight': 'mlp.up_proj.weight',
  'ffn_down.weight': 'mlp.down_proj.weight',
}
_PERMUTED = ('q_proj.weight', 'k_proj.weight', 'q_proj.bias', 'k_proj.bias')

_PLAIN_TYPES = {
  GGMLQuantizationType.F32: np.dtype(np.float32),
  GGMLQuantizationType.F16: np.dtype(np.float16),
  GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTISED_TYPES = (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0)
_TYPES = {int(kind): kind for kind in (*_PLAIN_TYPES, *_QUANTISED_TYPES)}

# Metadata value types: struct codes of the scalars, and the two that are not scalars.
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9
_REQUIRED = object()


class GgufTensor(NamedTuple):
  """Where one tensor lies in the file."""

  type: int  # a GGMLQuantizationType, or a number that this version of gguf does not know
  shape: tuple[int, ...]  # as numpy and Hugging Face have it: rows first
  offset: int  # bytes from the start of the file
  nbytes: int  # 0 for unsupported types


class GgufFile(NamedTuple):
  """A parsed header: metadata as plain Python values, tensors by GGUF name."""

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, GgufTensor]

  def field(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """A metadata value of the given type; InputError if it has another, or is absent without default."""
    value = self.metadata.get(key, default)
    if value is _REQUIRED:
      raise InputError(f'{self.path}: no metadata field {key}: convert the model again')
    accepted = (float, int) if kind is float else kind
    if value is not default and not isinstance(value, accepted):
      raise InputError(f'{self.path}: {key} = {value!r} should be of type {kind.__name__}: convert it again')
    return value

  def array(self, key: str, kind: type, default: Any = _REQUIRED) -> list[Any]:
    """A metadata array whose items have the given type; errors as `field`."""
    values = self.field(key, list, default)
    if values and not isinstance(values[0], kind):  # GGUF arrays hold one type
      raise InputError(f'{self.path}: {key} should hold items of type {kind.__name__}: convert it again')
    return values


class _Cursor:
  """Bounds-checked little-endian reads from a mapped file; ValueError beyond its end."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def take(self, count: int) -> bytes:
    if self.at + count > len(self.data):
      raise ValueError(f'the header goes on beyond the end of the file at byte {len(self.data)}')
    self.at += count
    return self.data[self.at - count : self.at]

  def scalar(self, code: str) -> Any:
    return struct.unpack('<' + code, self.take(struct.calcsize('<' + code)))[0]

  def string(self) -> str:
    return str(self.take(self.scalar('Q')), 'utf-8')

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind != _ARRAY:
      return self.scalar(_code(kind))
    item, count = self.scalar('I'), self.scalar('Q')
    if item == _STRING:
      return [self.string() for _ in range(count)]
    dtype = np.dtype('<' + _code(item))
    return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def _code(kind: int) -> str:
  if kind not in _SCALARS:
    raise ValueError(f'metadata of type {kind}')
  return _SCALARS[kind]


def open_file(path: str | os.PathLike[str]) -> GgufFile:
  """Parses the header, reading no tensor; InputError for a missing, corrupt or truncated file."""
  path = pathlib.Path(path)
  try:
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      metadata, tensors = _parse(_Cursor(data))
  except OSError as error:
    raise InputError(f'{path}: cannot be opened ({error.strerror}): check the path') from None
  except ValueError as error:
    raise InputError(f'{path}: corrupt or truncated GGUF file ({error}): download it again') from None
  return GgufFile(path, metadata, tensors)


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
  if cursor.take(4) != b'GGUF':
    raise ValueError('it does not start with GGUF')
  version = cursor.scalar('I')
  if version not in (2, 3):
    raise ValueError(f'version {version}; only little-endian files of version 2 and 3 are supported')
  tensor_count, field_count = cursor.scalar('Q'), cursor.scalar('Q')
  metadata = {}
  for _ in range(field_count):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.scalar('I'))
  infos = [_tensor_info(cursor) for _ in range(tensor_count)]
  alignment = metadata.get('general.alignment', 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f'general.alignment = {alignment!r}')
  start = -(-cursor.at // alignment) * alignment
  tensors = {}
  for name, tensor in infos:
    placed = tensor._replace(offset=start + tensor.offset)
    if placed.offset + placed.nbytes > len(cursor.data):
      raise ValueError(f'tensor {name!r} goes on beyond the end of the file at byte {len(cursor.data)}')
    if name in tensors:
      raise ValueError(f'two tensors are named {name!r}')
    tensors[name] = placed
  return metadata, tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, GgufTensor]:
  name = cursor.string()
  rank = cursor.scalar('I')
  if not 1 <= rank <= 4:
    raise ValueError(f'tensor {name!r} has {rank} dimensions')
  dims = [cursor.scalar('Q') for _ in range(rank)]
  kind, offset = cursor.scalar('I'), cursor.scalar('Q')
  nbytes = 0
  if kind in _TYPES:
    block, size = GGML_QUANT_SIZES[_TYPES[kind]]
    if dims[0] % block:
      raise ValueError(f'tensor {name!r} of shape {dims[::-1]} has no whole blocks of {block}')
    nbytes = math.prod(dims) // block * size
  return name, GgufTensor(kind, tuple(dims[::-1]), offset, nbytes)


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
  return ModelConfig(
    family=arch,
    vocab_size=vocab_size,
    hidden_size=file.field(f'{arch}.embedding_length', int),
    head_dim=_head_dim(file, arch),
    layers=_layers(file, arch),
    rope=_rope(file, arch),
    rms_norm_eps=file.field(f'{arch}.attention.layer_norm_rms_epsilon', float),
    tie_embeddings='output.weight' not in file.tensors,
    qkv_bias='blk.0.attn_q.bias' in file.tensors,
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
  if number in _TYPES:
    return _TYPES[number]
  try:
    found = GGMLQuantizationType(number).name
  except ValueError:
    found = f'number {number}'
  raise InputError(
    f'{file.path}: tensor {name!r} has type {found}, which is not supported: use a file of '
    f'{", ".join(kind.name for kind in _TYPES.values())} tensors'
  )


def _read_array(file: GgufFile, name: str) -> np.ndarray:
  """One tensor by GGUF name: float32 for F32 and the quantised types, else as stored."""
  kind, tensor = _type(file, name), file.tensors[name]
  # A plain read: pages of a mapped file would count as this process's memory.
  raw = np.fromfile(file.path, np.uint8, tensor.nbytes, offset=tensor.offset)
  if kind in _PLAIN_TYPES:
    return raw.view(_PLAIN_TYPES[kind]).reshape(tensor.shape)
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

  def read(self, name: str) -> np.ndarray:
    """One tensor in Hugging Face's layout; float32 unless stored as F16 or BF16."""
    array = _read_array(self._file, self._gguf_name[name])
    if self._permuted_head and name.endswith(_PERMUTED):
      half = self._permuted_head // 2
      pairs = array.reshape(-1, half, 2, *array.shape[1:])
      return pairs.swapaxes(1, 2).reshape(array.shape)
    return array

  def dtype(self) -> str:
    """Numpy name of the largest tensor's dtype as `read` gives it."""
    largest = max(self._file.tensors.values(), key=lambda t: math.prod(t.shape))
    return _PLAIN_TYPES.get(_TYPES[largest.type], np.dtype(np.float32)).name


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
