"""Reads and writes the safetensors files of a Hugging Face directory, by tensor and by part of a tensor.

`safetensors.numpy.save_file` would need all tensors of a file at once.
"""

import json
import math
import mmap
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import exists, read_json, regular

DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # safetensors name -> numpy name
_CODES = {name: code for code, name in DTYPES.items()}
_CHUNK = 1 << 17  # elements that are converted and written at once; 256 KiB in bf16, as cp does
INDEX_NAME = 'model.safetensors.index.json'


class _Stored(NamedTuple):
  """A tensor of a mapped file: its safetensors dtype, its shape, and the start and end of its bytes."""

  file: mmap.mmap
  dtype: str
  shape: tuple[int, ...]
  start: int
  end: int


class SafetensorsReader:
  """The `.safetensors` files of a directory, single or sharded."""

  def __init__(self, directory: str | pathlib.Path):
    self.where = str(directory)
    directory = pathlib.Path(directory)
    index, single = directory / INDEX_NAME, directory / 'model.safetensors'
    files = [single]
    if exists(index):
      with reading('', index, 'download it again'):
        files = [directory / name for name in sorted(set(read_json(index)['weight_map'].values()))]
    elif not exists(single):
      raise InputError(
        f'{directory}: no model.safetensors or {INDEX_NAME} here; other weight formats run code or '
        f'are not supported: convert the checkpoint to safetensors'
      )
    self.files = files
    self._tensors: dict[str, _Stored] = {}
    for file in files:
      with reading('safetensors file', file, 'download it again'):
        self._tensors |= _map(file)

  def names(self) -> set[str]:
    return set(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensors[name].shape

  def dtype(self, name: str) -> str:
    """Numpy name of the stored dtype; InputError if it is not supported."""
    code = self._tensors[name].dtype
    if code not in DTYPES:
      raise InputError(
        f'{self.where}: tensor {name} has dtype {code}, which is not supported: convert the checkpoint '
        f'to one of {", ".join(DTYPES)}'
      )
    return DTYPES[code]

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor, or the part of it at `index`, as pages of the file, which are read on use, not copied.

    It may be unaligned, and is read-only. Writing to the file changes it.
    """
    file, _, shape, start, end = self._tensors[name]
    file.madvise(mmap.MADV_DONTNEED)  # pages read before would still count as this process's memory
    data = np.frombuffer(file, np.uint8)[start:end]
    return data.view(self.dtype(name)).reshape(shape)[index or ...]


def _map(path: pathlib.Path) -> dict[str, _Stored]:
  """The tensors of a file, which holds the header's length in 8 bytes, the header in JSON, and the data.

  The library validates the file, but its numpy functions return only copies.
  Format: https://huggingface.co/docs/safetensors.
  """
  safe_open(regular(path), framework='np')
  with open(path, 'rb') as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  first = 8 + int.from_bytes(mapped[:8], 'little')
  header = json.loads(mapped[8:first])
  header.pop('__metadata__', None)
  return {
    name: _Stored(mapped, t['dtype'], tuple(t['shape']), *(first + at for at in t['data_offsets']))
    for name, t in header.items()
  }


def write_tensors(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[tuple[int, ...], Any]],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes a tensor for each name in `shapes`, in that order, with the shape and dtype given there.

  `read(name)` is called for one tensor at a time; another dtype is converted. Raises OSError.
  Format: https://huggingface.co/docs/safetensors.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, (shape, dtype) in shapes.items():
    start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {'dtype': _CODES[np.dtype(dtype).name], 'shape': shape, 'data_offsets': (start, end)}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # as the library does, so that the data is aligned to 8 bytes
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, (shape, dtype) in shapes.items():
      flat = read(name).reshape(math.prod(shape))
      for i in range(0, flat.size, _CHUNK):
        file.write(np.ascontiguousarray(flat[i : i + _CHUNK], dtype).view(np.uint8).data)
      del flat  # free it before the next one is read
