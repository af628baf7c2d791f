"""GGUF input: the config and the weights of a .gguf file, in Hugging Face's names and layout."""

import dataclasses
import math
import os
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from adapt_jax.models.config import LayerShape, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from adapt_jax.models.errors import reading
from adapt_jax.models.formats.gguf_architectures import ARCHITECTURES
from adapt_jax.models.formats.gguf_header import GgufFile, open_file
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


def _config(file: GgufFile) -> ModelConfig:
  """The ModelConfig that the metadata and tensor names describe."""
  arch = _architecture(file)
  _refuse_unsupported(file, arch)
  known = ARCHITECTURES[arch]
  window, key = known.window, f'{arch}.attention.sliding_window'
  if known.window_every and (not window or key in file.metadata):
    window = file.field(key, int)
  config = ModelConfig(
    family=_family(file, arch),
    vocab_size=file.tensors['token_embd.weight'].shape[0],
    hidden_size=file.field(f'{arch}.embedding_length', int),
    head_dim=_head_dim(file, arch),
    layers=_layers(file, arch),
    rope=_rope(file, arch),
    rms_norm_eps=_positive(file, f'{arch}.attention.layer_norm_rms_epsilon'),
    tie_embeddings='output.weight' not in file.tensors,
    qkv_bias='blk.0.attn_q.bias' in file.tensors,
    output_bias='blk.0.ffn_down.bias' in file.tensors,
    qk_norm='blk.0.attn_q_norm.weight' in file.tensors,
    max_position=file.field(f'{arch}.context_length', int),
  )
  numbers: dict[str, Any] = {}
  for field, (key, usual) in known.numbers.items():
    key = f'{arch}.{key}'
    numbers[field] = usual if file.field(key, float, usual) == usual else _positive(file, key)
  return known.implied(dataclasses.replace(config, **numbers), window)


def _positive(file: GgufFile, key: str, **default: float) -> float:
  value = _decimal(file.field(key, float, **default))
  if not 0 < value < math.inf:
    raise ValueError(f'{key} = {value} should be a finite number above 0')
  return value


def _architecture(file: GgufFile) -> str:
  arch = file.field('general.architecture', str)
  if arch not in ARCHITECTURES:
    raise ValueError(f'general.architecture {arch!r} is not supported, only {", ".join(ARCHITECTURES)}')
  return arch


def _family(file: GgufFile, arch: str) -> str:
  if arch not in ('llama', 'deci'):
    return ARCHITECTURES[arch].family
  # A llama with biases on q, k and v, but not on o, is what Hugging Face calls qwen2.
  biased = 'blk.0.attn_q.bias' in file.tensors and 'blk.0.attn_output.bias' not in file.tensors
  family: str = file.field(FAMILY_KEY, str, 'qwen2' if biased else 'llama')
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
  if unsupported := [f'{arch}.{key}' for key, present in refused.items() if present]:
    raise ValueError(f'{unsupported[0]} = {file.metadata[unsupported[0]]!r} is not supported')


def _per_layer(file: GgufFile, arch: str, key: str) -> list[int]:
  """A width of each layer, stored once for all layers or as an array."""
  key = f'{arch}.{key}'
  depth = file.field(f'{arch}.block_count', int)
  value = file.metadata.get(key)
  values = value if isinstance(value, list) else [file.field(key, int)] * min(depth, len(file.tensors))
  if len(values) != depth:
    raise ValueError(f'{key} has {len(values)} widths for {depth} layers')
  return values


def _layers(file: GgufFile, arch: str) -> tuple[LayerShape, ...]:
  heads = kv_heads = _per_layer(file, arch, 'attention.head_count')
  if f'{arch}.attention.head_count_kv' in file.metadata:
    kv_heads = _per_layer(file, arch, 'attention.head_count_kv')
  widths = _per_layer(file, arch, 'feed_forward_length')
  return tuple(LayerShape(*layer) for layer in zip(heads, kv_heads, widths, strict=True))


def _head_dim(file: GgufFile, arch: str) -> int:
  head_dim: int = file.field(f'{arch}.attention.key_length', int, 0)
  head_dim = head_dim or file.field(f'{arch}.rope.dimension_count', int, 0)
  hidden = file.field(f'{arch}.embedding_length', int)
  return head_dim or hidden // _per_layer(file, arch, 'attention.head_count')[0]


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
  head_dim = _head_dim(file, arch)
  divisors = _read_array(file, ROPE_FREQS)
  # The longest wavelengths are divided by `factor`; LLaMA 3.1 and 3.2 differ in nothing else.
  parts = file.field(SCALING_KEY, list, [float(divisors.max(initial=1.0)), 1.0, 4.0, 8192.0])
  if factor == 1 and divisors.shape == (head_dim // 2,):
    factor, low, high, original = map(_decimal, parts)
    scaled = RopeConfig(rope.theta, Llama3Scaling(factor, low, high, int(original)))
    expected = rope_divisors(scaled, head_dim)
    if np.allclose(divisors, expected, rtol=1e-3, atol=0):
      return scaled
  raise ValueError(
    f'{ROPE_FREQS} is not the llama3 rotary scaling with factor, low_freq_factor, high_freq_factor and '
    f'original length {parts}, without another scaling'
  )


def rope_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """The values of rope_freqs.weight: the scaling's divisor of each frequency, float32 [H/2]."""
  return inverse_frequencies(RopeConfig(rope.theta), head_dim) / inverse_frequencies(rope, head_dim)


def _read_array(file: GgufFile, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
  """A tensor by GGUF name, or a part of it: float32 for F32 and the quantised types, else as stored."""
  tensor = file.tensors[name]
  kind = tensor.type
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
  """The configuration of a .gguf file, and its weights by Hugging Face name, each read on request.

  Raises InputError for a missing, corrupt or truncated file and for an unsupported tensor type, and names a
  feature that this decoder would compute wrongly: other architectures, experts, other rotary scalings and
  sliding windows.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self._file = open_file(path)
    self.where, self.files, self.metadata = str(path), list(self._file.parts), self._file.metadata
    with reading('GGUF file', path, 'use a model of the families in docs/families.md'):
      self.config = _config(self._file)
      arch = ARCHITECTURES[_architecture(self._file)]
      # `check_tensors` refuses a tensor that the architecture does not have under its own name.
      names = {stored: name for name, stored in arch.gguf_names(self.config).items()}
    self._permuted_head = self.config.head_dim if arch.permuted else None
    self._norm_offset = arch.traits.norm_offset
    self._gguf_name = {
      names.get(stored, f'gguf:{stored}'): stored for stored in self._file.tensors if stored != ROPE_FREQS
    }

  @property
  def quantised(self) -> bool:
    """Whether some tensors have fewer than 16 bits a weight."""
    return any(tensor.type not in STORED_DTYPES for tensor in self._file.tensors.values())

  def names(self) -> set[str]:
    """Hugging Face names of all tensors."""
    return set(self._gguf_name)

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape as `read` gives it: [out, in] for matrices."""
    return self._file.tensors[self._gguf_name[name]].shape

  def dtype(self, name: str) -> str:
    """Numpy name of the dtype that `read` gives."""
    return STORED_DTYPES.get(self._file.tensors[self._gguf_name[name]].type, np.dtype(np.float32)).name

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
