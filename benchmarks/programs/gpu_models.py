"""What the rows of benchmarks/gpu.py share: random models, tokens, clocks and the compiler's plan."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.machine.compiled_text import CompiledText
from adapt_jax.machine.targets import TARGETS
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network import llama
from adapt_jax.modes import estimate
from adapt_jax.modes.estimate_programs import Program
from benchmarks.gpu import Row

BF16 = jnp.dtype(jnp.bfloat16)


def model(name: str) -> ModelConfig:
  """The ModelConfig of a row's model."""

  def shape(vocab: int, hidden: int, head: int, n: int, k: int, ffn: int, layers: int, tied: bool) -> Any:
    shapes = (LayerShape(n, k, ffn),) * layers
    return ModelConfig('llama', vocab, hidden, head, shapes, RopeConfig(5e5), 1e-5, tied, max_position=8192)

  found: ModelConfig = {
    '135M': shape(49_152, 576, 64, 9, 3, 1536, 30, True),
    '1B': shape(128_256, 2048, 64, 32, 8, 8192, 16, True),
    '1B, 4 different layers': shape(128_256, 2048, 64, 32, 8, 8192, 4, True),
    '3B': shape(128_256, 3072, 128, 24, 8, 8192, 28, True),
    '8B, 2 of 32 layers': shape(128_256, 4096, 128, 32, 8, 14_336, 2, False),
    '8B, 8 of 32 layers': shape(128_256, 4096, 128, 32, 8, 14_336, 8, False),
    'toy': shape(64, 48, 8, 6, 2, 64, 1, True),
  }[name]
  if 'different' not in name:
    return found
  # As pruned: each layer has fewer KV groups and channels than the one before.
  shapes = [LayerShape(32 - 4 * i, 8 - i, 8192 - 640 * (i + 1)) for i in range(found.num_layers)]
  return found.with_layers(tuple(shapes))


def seconds_of(run: Callable[[], Any], enough: float = 3.0, least: int = 3) -> list[float]:
  """Seconds of each of `least` or more calls, until they total `enough`; `run` must wait for its result."""
  found: list[float] = []
  while len(found) < least or sum(found) < enough:
    start = time.perf_counter()
    run()
    found.append(time.perf_counter() - start)
  return found


def weights(config: ModelConfig, dtype: Any) -> llama.Params:
  """Random parameters, made on the device leaf by leaf."""

  @functools.partial(jax.jit, static_argnums=1)
  def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)

  leaves, structure = jax.tree.flatten(llama.abstract_params(config, dtype))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  norms = [x.ndim == 1 for x in leaves]
  made = [
    jnp.ones_like(x) if norm else draw(key, x.shape) for key, x, norm in zip(keys, leaves, norms, strict=True)
  ]
  return jax.tree.unflatten(structure, made)


def tokens(row: Row, config: ModelConfig) -> np.ndarray:
  return np.random.default_rng(0).integers(0, config.vocab_size, (row.rows, row.length)).astype(np.int32)


def segments(row: Row) -> np.ndarray:
  """Four documents per row, int32 [rows, length]."""
  return np.broadcast_to(1 + np.arange(row.length, dtype=np.int32) * 4 // row.length, (row.rows, row.length))


def stats(name: str) -> int:
  """A statistic of the device's memory, in bytes; 0 if the backend keeps none, as on CPU."""
  return int((jax.local_devices()[0].memory_stats() or {}).get(name, 0))


def plan(program: Any) -> dict[str, Any]:
  """What the compiler plans to hold, bytes, and the seconds that no execution can beat; 0 if not known."""
  memory, kind = program.memory_analysis(), jax.devices()[0].device_kind.lower()
  found = {'planned': memory.argument_size_in_bytes + memory.temp_size_in_bytes, 'limit': 0.0}
  for name, target in TARGETS.items():
    if target.platform == 'cuda' and name in kind:
      text = CompiledText(program.as_text())
      whole = Program(0, 0, 0, moved=text.bytes_moved(), kernels=tuple(text.kernels()))
      found['limit'] = estimate.limit(whole, target).limit
  return found
