"""Stored tensors that hold the rows of several others, such as Phi-3's qkv_proj (`Family.fused`)."""

import numpy as np

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.formats.hf_weights import TensorReader


class SplitReader:
  """A `TensorReader` that gives the parts of fused tensors under the names of Llama's."""

  def __init__(self, config: ModelConfig, reader: TensorReader):
    self._reader, self._names = reader, reader.names()
    self.where, self.files = reader.where, reader.files
    self._parts: dict[str, tuple[str, int, int]] = {}  # name -> the stored tensor, first row, rows
    for i, shape in enumerate(config.layers):
      for fused, names in config.traits.fused.items():
        stored, first = f'model.layers.{i}.{fused}.weight', 0
        if stored not in self._names:
          continue
        self._names.remove(stored)
        for name in names:
          rows = _rows(config, shape)[name]
          if name == names[-1]:  # all that is left, so that a tensor of another size is refused by its shape
            rows = reader.shape(stored)[0] - first
          self._parts[f'model.layers.{i}.{name}.weight'] = stored, first, rows
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


def _rows(config: ModelConfig, shape: LayerShape) -> dict[str, int]:
  """Rows of the projections that read the residual stream."""
  kv = shape.num_kv_heads * config.head_dim
  widths = {'q_proj': shape.num_heads * config.head_dim, 'k_proj': kv, 'v_proj': kv}
  return {f'self_attn.{name}': rows for name, rows in widths.items()} | {
    f'mlp.{name}': shape.ffn for name in ('gate_proj', 'up_proj')
  }
