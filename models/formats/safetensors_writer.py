"""A safetensors file written tensor by tensor: `safetensors.numpy.save_file` takes all of a file at once."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models.formats.safetensors import DTYPES

_CODES = {name: code for code, name in DTYPES.items()}
_CHUNK = 1 << 17  # elements that are converted and written at once; in bf16 256 KiB, as cp takes them


def write_tensors(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[tuple[int, ...], Any]],
  read: Callable[[str], np.ndarray],
) -> None:
  """Writes a tensor for each name of `shapes`, which has its shape and dtype, in that order.

  `read(name)` gives it when its turn comes; one of another dtype is converted. Raises OSError.
  Format: https://huggingface.co/docs/safetensors.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, (shape, dtype) in shapes.items():
    start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {'dtype': _CODES[np.dtype(dtype).name], 'shape': shape, 'data_offsets': (start, end)}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # as the library does, so that readers find numbers at even addresses
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, (shape, dtype) in shapes.items():
      flat = read(name).reshape(math.prod(shape))
      for i in range(0, flat.size, _CHUNK):
        file.write(np.ascontiguousarray(flat[i : i + _CHUNK], dtype).view(np.uint8).data)
      del flat  # before the next one is read
