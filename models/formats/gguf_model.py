"""GGUF input: the config and the weights of a .gguf file, in Hugging Face's names and layout."""

import dataclasses
import math
import os
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from adapt_jax.models.config import MOST, LayerShape, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.formats.gguf_architectures import ARCHITECTURES
from adapt_jax.models.formats.gguf_header import TENSOR_TYPES, GgufFile, open_file
from adapt_jax.models.network.rope import inverse_frequencies

PERMUTED = ('q_proj.weight', 'k_proj.weight', 'q_proj.bias', 'k_proj.bias')
ROPE_FREQS = 'rope_freqs.weight'
# Fields that llama.cpp does not need, but that restore an equal ModelConfig; written by our own export.
FAMILY_KEY = 'adapt_jax.family'
SCALING_KEY = 'adapt_jax.llama3_scaling'
STORED_DTYPES = {
  GGMLQuantizationType.F32: np.dtype(np.float32),
  GGMLQuantizationType.F16: np.dtype(np.float16),
  GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
  """The ModelConfig that the metadata and tensor names describe.

  Raises InputError for a missing, corrupt or truncated file, and names a feature that this decoder
  would compute wrongly: other architectures, experts, other rotary scalings and sliding windows.
  """
  file = open_file(path)
  arch = _architecture(file)
  _refuse_unsupported(file, arch)
  embedding = file.tensors.get('token_embd.weight')
  if embedding is None:
    raise InputError(f'{file.path}: no tensor token_embd.weight: use a file of the whole model')
  vocab_size = _bounded(file, 'rows of token_embd.weight', embedding.shape[0], 'vocab_size')
  tokens = len(file.array('tokenizer.ggml.tokens', str, []))
  if tokens > vocab_size:
    raise InputError(
      f'{file.path}: tokenizer.ggml.tokens has {tokens} entries, but token_embd.weight has only '
      f'{vocab_size} rows: tokenizer and weights do not match'
    )
  known = ARCHITECTURES[arch]
  window, key = known.window, f'{arch}.attention.sliding_window'
  if known.window_every and (not window or key in file.metadata):
    window = _size(file, key, 'window')
  config = ModelConfig(
    family=_family(file, arch),
    vocab_size=vocab_size,
    hidden_size=_size(file, f'{arch}.embedding_length', 'hidden_size'),
    head_dim=_head_dim(file, arch),
    layers=_layers(file, arch),
    rope=_rope(file, arch),
    rms_norm_eps=_positive(file, f'{arch}.attention.layer_norm_rms_epsilon'),
    tie_embeddings='output.weight' not in file.tensors,
    qkv_bias='blk.0.attn_q.bias' in file.tensors,
    output_bias='blk.0.ffn_down.bias' in file.tensors,
    qk_norm='blk.0.attn_q_norm.weight' in file.tensors,
    max_position=_size(file, f'{arch}.context_length', 'max_position'),
  )
  numbers: dict[str, Any] = {
    field: _number(file, f'{arch}.{key}', usual) for field, (key, usual) in known.numbers.items()
  }
  return known.implied(dataclasses.replace(config, **numbers), window)


def _number(file: GgufFile, key: str, usual: float) -> float:
  return usual if file.field(key, float, usual) == usual else _positive(file, key)


def _positive(file: GgufFile, key: str, **default: float) -> float:
  value = _decimal(file.field(key, float, **default))
  if not 0 < value < math.inf:
    raise InputError(
      f'{file.path}: {key} = {value} should be a finite number above 0: convert the model again'
    )
  return value


def _size(file: GgufFile, key: str, name: str) -> int:
  return _bounded(file, key, file.field(key, int), name)


def _bounded(file: GgufFile, what: str, value: int, name: str) -> int:
  """The value, if it is at least 1 and at most that of `MOST`; otherwise raises InputError."""
  if not 1 <= value <= MOST[name]:
    raise InputError(
      f'{file.path}: {what} = {value} should be from 1 to {MOST[name]:,}: convert the model again'
    )
  return value


def _architecture(file: GgufFile) -> str:
  arch = file.field('general.architecture', str)
  if arch not in ARCHITECTURES:
    raise InputError(
      f'{file.path}: general.architecture {arch!r} is not supported, only {", ".join(ARCHITECTURES)}'
    )
  return arch


def _family(file: GgufFile, arch: str) -> str:
  if arch not in ('llama', 'deci'):
    return ARCHITECTURES[arch].family
  # A llama with biases on q, k and v, but not on o, is what Hugging Face calls qwen2.
  biased = 'blk.0.attn_q.bias' in file.tensors and 'blk.0.attn_output.bias' not in file.tensors
  family = file.field(FAMILY_KEY, str, 'qwen2' if biased else 'llama')
  if family not in FAMILIES:
    raise InputError(f'{file.path}: {FAMILY_KEY} = {family!r} is unknown; known: {", ".join(FAMILIES)}')
  return family


def _decimal(value: float) -> float:
  """The shortest decimal of a number that the file stores as float32: 1e-05, not 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _refuse_unsupported(file: GgufFile, arch: str) -> None:
  def get(key: str, kind: type, default: Any) -> Any:
    return file.field(f'{arch}.{key}', kind, default)

  head_dim, known = _head_dim(file, arch), ARCHITECTURES[arch]
  window = get('attention.sliding_window', int, 0)
  depth, kind = get('block_count', int, 0), get('rope.scaling.type', str, 'linear')
  every, local_theta = known.window_every, known.local_theta or _base(file, arch)
  caps = ('attn_logit_softcapping', 'final_logit_softcapping')
  refused = {
    'expert_count': get('expert_count', int, 0) > 0,
    'rope.scaling.type': kind not in ('none', 'linear'),
    'rope.scaling.finetuned': arch == 'granite' and not get('rope.scaling.finetuned', bool, True),
    'rope.dimension_count': get('rope.dimension_count', int, head_dim) != head_dim,
    'attention.value_length': get('attention.value_length', int, head_dim) != head_dim,
    'attention.sliding_window': not known.window_every and 0 < window < get('context_length', int, 0),
    'attention.sliding_window_pattern': every > 0
    and file.metadata.get(f'{arch}.attention.sliding_window_pattern', every)
    not in (every, [i % every > 0 for i in range(1, depth + 1)]),
    'rope.freq_base_swa': get('rope.freq_base_swa', float, local_theta) != local_theta,
    **{key: get(key, float, 0.0) != 0 and key not in dict(known.numbers.values()) for key in caps},
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
  if not 0 < depth <= min(len(file.tensors), MOST['num_layers']):
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
  if not 2 <= head_dim <= MOST['head_dim'] or head_dim % 2:
    raise InputError(
      f'{file.path}: a head dimension of {head_dim} is not supported: it should be even, and at most '
      f'{MOST["head_dim"]:,}'
    )
  return head_dim


def _linear_factor(file: GgufFile, arch: str) -> float:
  """The factor of linear rotary scaling, 1 if there is none."""
  key = f'{arch}.rope.scaling.factor'
  if key not in file.metadata:
    key = f'{arch}.rope.scale_linear'  # the name in old files
  if file.field(f'{arch}.rope.scaling.type', str, 'linear') != 'linear':
    return 1.0
  return _positive(file, key) if file.field(key, float, 0.0) else 1.0


def _base(file: GgufFile, arch: str) -> float:
  """The base frequency of rotary embeddings, which files with another one for windows must name."""
  usual = {} if ARCHITECTURES[arch].local_theta else {'default': 10000.0}
  return _positive(file, f'{arch}.rope.freq_base', **usual)


def _rope(file: GgufFile, arch: str) -> RopeConfig:
  """Base frequency, and the linear scaling or the llama3 scaling that matches rope_freqs.weight."""
  rope = RopeConfig(_base(file, arch))
  factor = _linear_factor(file, arch)
  if ROPE_FREQS not in file.tensors:
    return rope if factor == 1 else RopeConfig(rope.theta, LinearScaling(factor))
  if factor != 1:
    raise InputError(
      f'{file.path}: linear rotary scaling by {factor} together with {ROPE_FREQS} is not supported; use a '
      f'model with one of them'
    )
  head_dim = _head_dim(file, arch)
  divisors = _read_array(file, ROPE_FREQS)
  # The longest wavelengths are divided by `factor`; LLaMA 3.1 and 3.2 differ in nothing else.
  parts = file.array(SCALING_KEY, float, [float(divisors.max(initial=1.0)), 1.0, 4.0, 8192.0])
  if len(parts) == 4 and np.isfinite(parts).all():
    factor, low, high, original = map(_decimal, parts)
    scaled = RopeConfig(rope.theta, Llama3Scaling(factor, low, high, int(original)))
    expected = rope_divisors(scaled, head_dim)
    if divisors.shape == expected.shape and np.allclose(divisors, expected, rtol=1e-3, atol=0):
      return scaled
  raise InputError(
    f'{file.path}: {ROPE_FREQS} is not the llama3 rotary scaling with factor, low_freq_factor, '
    f'high_freq_factor and original length {parts}: use the Hugging Face checkpoint'
  )


def rope_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """The values of rope_freqs.weight: the scaling's divisor of each frequency, float32 [H/2]."""
  return inverse_frequencies(RopeConfig(rope.theta), head_dim) / inverse_frequencies(rope, head_dim)


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


def _read_array(file: GgufFile, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
  """A tensor by GGUF name, or a part of it: float32 for F32 and the quantised types, else as stored."""
  kind, tensor = _type(file, name), file.tensors[name]
  index = (*index, *[slice(None)] * (len(tensor.shape) - len(index)))
  *outer, width = tensor.shape
  start, stop, _ = index[-1].indices(width)
  block, nbytes = GGML_QUANT_SIZES[kind]  # elements and bytes of a block; blocks run along the last axis
  first, end = start // block, -(-stop // block)
  # Mapped only for this copy: pages of a file that stays mapped count as this process's memory.
  mapped = np.memmap(tensor.path, np.uint8, 'r', tensor.offset, (*outer, width // block * nbytes))
  raw = np.array(mapped[(*index[:-1], slice(first * nbytes, end * nbytes))])
  if kind in STORED_DTYPES:
    return raw.view(STORED_DTYPES[kind])
  return dequantize(raw, kind)[..., start - first * block : stop - first * block]


class GgufReader:
  """The weights of a .gguf file by Hugging Face name, each read from disk on request."""

  def __init__(self, path: str | os.PathLike[str]):
    self._file = open_file(path)
    self.where, self.files = str(path), list(self._file.parts)
    named = _architecture(self._file)
    arch = ARCHITECTURES[named]
    self._norm_offset = arch.traits.norm_offset
    self._permuted_head = _head_dim(self._file, named) if arch.permuted else None
    self._gguf_name = {}
    for name in self._file.tensors:
      _type(self._file, name)  # raises before anything is read
      if name != ROPE_FREQS:
        if (hf := arch.hf_name(name)) is None:
          raise InputError(f'{path}: tensor {name!r} is unknown: the model has unsupported parts')
        self._gguf_name[hf] = name

  @property
  def metadata(self) -> dict[str, Any]:
    """The fields of the header."""
    return self._file.metadata

  def names(self) -> set[str]:
    """Hugging Face names of all tensors."""
    return set(self._gguf_name)

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape as `read` gives it: [out, in] for matrices."""
    return self._file.tensors[self._gguf_name[name]].shape

  def dtype(self, name: str) -> str:
    """Numpy name of the dtype that `read` gives; InputError if the stored type is not supported."""
    return STORED_DTYPES.get(_type(self._file, self._gguf_name[name]), np.dtype(np.float32)).name

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor in Hugging Face's layout, or the part of it at `index`; only its blocks are read.

    float32 unless stored as F16 or BF16.
    """
    stored, head = self._gguf_name[name], self._permuted_head
    if self._norm_offset and name.endswith('norm.weight'):  # GGUF has the sum
      return _read_array(self._file, stored, index) - np.float32(self._norm_offset)
    if not head or not name.endswith(PERMUTED):
      return _read_array(self._file, stored, index)
    rows, *columns = index or (slice(None),)
    start, stop, _ = rows.indices(self.shape(name)[0])
    first = start // head * head  # rows are permuted within a head: read whole heads
    array = _read_array(self._file, stored, (slice(first, -(-stop // head) * head), *columns))
    pairs = array.reshape(-1, head // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)[start - first : stop - first]


def open_tensors(path: str | os.PathLike[str]) -> GgufReader:
  """Opens the weights without reading any.

  Raises InputError for a missing, corrupt or truncated file, an unsupported architecture, and
  a tensor that is unknown or has an unsupported type, which it names.
  """
  return GgufReader(path)
