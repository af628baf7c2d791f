"""The header of a .gguf file: metadata as plain values, and the location of each tensor.

It is parsed here because gguf.GGUFReader keeps a numpy view of every metadata string (2 s and 160 MB
for a vocabulary of 49k) and loops without limit if an array's length is corrupt.
"""

import math
import mmap
import os
import pathlib
import re
import struct
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import regular

# The supported tensor types: the first three are read as stored, the others are dequantised to float32.
_NAMES = 'F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K'
TENSOR_TYPES = {int(kind): kind for kind in (GGMLQuantizationType[name] for name in _NAMES.split())}

# Metadata value types: struct codes of the scalars, and the two that are not scalars.
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9
_REQUIRED = object()
_PART = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.gguf')


class GgufTensor(NamedTuple):
  """Location of one tensor."""

  type: GGMLQuantizationType
  shape: tuple[int, ...]  # in the order of numpy and Hugging Face: rows first
  offset: int  # bytes from the start of the file
  nbytes: int
  path: pathlib.Path  # of the file, which is one of several for a split model


class GgufFile(NamedTuple):
  """A parsed header: metadata as plain Python values, tensors by GGUF name."""

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, GgufTensor]
  parts: tuple[pathlib.Path, ...]  # all files of the model; `path` is the first

  def field(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """A metadata value; ValueError for another type, or if it is absent without default."""
    value = self.metadata.get(key, default)
    accepted = (float, int) if kind is float else kind
    if value is not default and not isinstance(value, accepted) or value is _REQUIRED:
      shown = 'absent' if value is _REQUIRED else repr(value)
      raise ValueError(f'{key} is {shown}, but should be of type {kind.__name__}')
    return value


class _Cursor:
  """Bounds-checked little-endian reads from a mapped file; ValueError beyond its end."""

  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def take(self, count: int) -> bytes:
    if self.at + count > len(self.data):
      raise ValueError(f'the header extends past the end of the file at byte {len(self.data)}')
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
      return self.scalar(_SCALARS[kind])
    item, count = self.scalar('I'), self.scalar('Q')
    if item == _STRING:
      return [self.string() for _ in range(count)]
    dtype = np.dtype('<' + _SCALARS[item])
    return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


def open_file(path: str | os.PathLike[str]) -> GgufFile:
  """Parses the header, reading no tensor, and those of the other parts if the model is split.

  Raises InputError for a missing, corrupt or truncated file, and for parts that do not belong together.
  """
  path = pathlib.Path(path)
  metadata, tensors = _open_part(path)
  count = metadata.get('split.count', 1)
  if not isinstance(count, int) or count <= 1:
    return GgufFile(path, metadata, tensors, (path,))
  parts = _parts(path, count)
  for number, part in enumerate(parts[1:], 1):
    more, others = _open_part(part)
    if (more.get('split.no'), more.get('split.count')) != (number, count) or others.keys() & tensors.keys():
      raise InputError(f'{part} is not part {number + 1} of the {count} files of {path}: download it again')
    tensors |= others
  return GgufFile(path, metadata, tensors, parts)


def _parts(path: pathlib.Path, count: int) -> tuple[pathlib.Path, ...]:
  """The files of a split model, by llama.cpp's names. Raises InputError if `path` is not the first."""
  named = _PART.fullmatch(path.name)
  if not named or int(named[2]) != 1 or int(named[3]) != count:
    first = f'{named[1] if named else path.stem}-{1:05}-of-{count:05}.gguf'
    raise InputError(f'{path} is one of {count} files of a split model: name the first, {first}')
  return tuple(path.with_name(f'{named[1]}-{number:05}-of-{count:05}.gguf') for number in range(1, count + 1))


def _open_part(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
  with (
    reading('GGUF file', path, 'download it again (make fetch downloads the demo)'),
    open(regular(path), 'rb') as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
  ):
    return _parse(_Cursor(data), path)


def _parse(cursor: _Cursor, path: pathlib.Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
  if cursor.take(4) != b'GGUF' or cursor.scalar('I') not in (2, 3):
    raise ValueError('not a little-endian GGUF file of version 2 or 3')
  tensor_count, field_count = cursor.scalar('Q'), cursor.scalar('Q')
  metadata = {}
  for _ in range(field_count):
    key = cursor.string()
    metadata[key] = cursor.value(cursor.scalar('I'))
  infos = [_tensor_info(cursor, path) for _ in range(tensor_count)]
  alignment = metadata.get('general.alignment', 32)
  start = -(-cursor.at // alignment) * alignment
  tensors: dict[str, GgufTensor] = {}
  expected = 0
  for name, tensor in infos:
    end = tensor.offset + tensor.nbytes
    # As llama.cpp, which would otherwise read other weights: they lie one after another.
    if name in tensors or tensor.offset != expected or start + end > len(cursor.data) or alignment < 1:
      raise ValueError(
        f'corrupt or truncated: tensor {name!r} at byte {start + tensor.offset} of {len(cursor.data)} does '
        f'not begin where the one before it ends'
      )
    tensors[name] = tensor._replace(offset=start + tensor.offset)
    expected = -(-end // alignment) * alignment
  return metadata, tensors


def _tensor_info(cursor: _Cursor, path: pathlib.Path) -> tuple[str, GgufTensor]:
  name = cursor.string()
  dims = [cursor.scalar('Q') for _ in range(cursor.scalar('I'))]
  kind, offset = cursor.scalar('I'), cursor.scalar('Q')
  block, size = GGML_QUANT_SIZES[TENSOR_TYPES[kind]] if kind in TENSOR_TYPES else (0, 0)
  if not block or dims[0] % block:
    raise ValueError(
      f'tensor {name!r} has the type {kind} and the shape {dims[::-1]}, which are not supported: use a file '
      f'of {_NAMES.replace(" ", ", ")} tensors'
    )
  nbytes = math.prod(dims) // block * size
  return name, GgufTensor(TENSOR_TYPES[kind], tuple(dims[::-1]), offset, nbytes, path)
