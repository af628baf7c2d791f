"""Readers that count, and models that divide among devices: for the tests of streaming."""

import pathlib
import weakref

import numpy as np
from gguf import GGMLQuantizationType as Type

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.formats.hf_weights import TensorReader, leaves
from tests.formats.test_gguf_model import write_model
from tests.support.helpers import random_params, save_checkpoint, tiny_config

LAYERS = (LayerShape(8, 4, 96),) * 2  # all of it divides by four


def divisible_config(family: str) -> ModelConfig:
  # GGUF keeps no parameters of rotary scaling, only their effect.
  rope = tiny_config('qwen2').rope
  return tiny_config(family, LAYERS, hidden_size=64, head_dim=16, rope=rope)


def write_checkpoints(directory: pathlib.Path) -> None:
  """A tied and an untied model, in one file and in several, and a quantised GGUF file."""
  config = divisible_config('llama')
  save_checkpoint(directory / 'llama', config, random_params(config))
  config = divisible_config('qwen2')
  params = random_params(config)
  save_checkpoint(directory / 'qwen2', config, params, dtype='bfloat16', shard_bytes=20_000)
  write_model(directory / 'llama.gguf', divisible_config('llama'), Type.Q8_0)


class CountingReader:
  """Reads through another reader; counts how often each element is read and the bytes alive at once."""

  def __init__(self, reader: TensorReader, config: ModelConfig):
    self._reader, self.where = reader, reader.where
    self.names, self.shape, self.dtype = reader.names, reader.shape, reader.dtype
    self.times = {leaf.name: np.zeros(leaf.hf_shape, np.int8) for leaf in leaves(config)}
    self.alive = self.peak = 0

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    self.times[name][index] += 1
    found = self._reader.read(name, index)
    # JAX takes aligned memory over as a device's: it has to copy this.
    memory = np.empty(found.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64 + 4
    self._add(found.nbytes)
    weakref.finalize(memory, self._add, -found.nbytes)
    copy = memory[start : start + found.nbytes].view(found.dtype).reshape(found.shape)
    copy[...] = found
    return copy

  def _add(self, nbytes: int) -> None:
    self.alive += nbytes
    self.peak = max(self.peak, self.alive)

  def largest(self) -> int:
    """Bytes of the largest tensor."""
    return max(np.dtype(self.dtype(name)).itemsize * times.size for name, times in self.times.items())
