"""Stored tensors that hold the rows of several others, such as Phi-3's qkv_proj (`Family.fused`)."""

import numpy as np

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.hf_weights import TensorReader, stored_leaves


class SplitReader:
  """A `TensorReader` that gives the parts of fused tensors under the names of Llama's."""

  def __init__(self, config: ModelConfig, reader: TensorReader):
    self._reader, self._names = reader, reader.names()
    self.where, self.files = reader.where, reader.files
    self._parts: dict[str, tuple[str, int, int]] = {}  # name -> the stored tensor, first row, rows
    for stored, parts in stored_leaves(config).items():
      if len(parts) == 1 or stored not in self._names:
        continue
      self._names.remove(stored)
      first = 0
      for leaf in parts:
        rows = leaf.hf_shape[0]
        if leaf is parts[-1]:  # all that is left, so that a tensor of another size is refused by its shape
          rows = reader.shape(stored)[0] - first
        self._parts[leaf.name] = stored, first, rows
        first += rows

  def names(self) -> set[str]:
    """Names of all tensors, with parts in place of fused tensors."""
    return self._names | set(self._parts)

  def shape(self, name: str) -> tuple[int, ...]:
    if name not in self._parts:
      return self._reader.shape(name)
    stored, _, rows = self._parts[name]
    return (rows, *self._reader.shape(stored)[1:])

  def dtype(self, name: str) -> str:
    return self._reader.dtype(self._parts[name][0] if name in self._parts else name)

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    if name not in self._parts:
      return self._reader.read(name, index)
    stored, first, count = self._parts[name]
    rows, *columns = index or (slice(None),)
    start, stop, _ = rows.indices(count)
    return self._reader.read(stored, (slice(first + start, first + stop), *columns))
