"""Limits of this machine: one big product in fp32 and bfloat16, and memory. Prints JSON."""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def best_seconds(work: Callable[..., Any], *args: Any) -> float:
  """The shortest of ten calls."""
  program = jax.jit(work)
  jax.block_until_ready(program(*args))
  found = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(program(*args))
    found.append(time.perf_counter() - start)
  return min(found)


def gflops(dtype: Any, size: int = 1024) -> float:
  """GFLOP/s of a square product with fp32 sums."""
  a, b = (jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), dtype) for _ in range(2))

  def eight(a: jax.Array, b: jax.Array) -> list[jax.Array]:
    return [jnp.dot(a + i, b, preferred_element_type=jnp.float32) for i in range(8)]

  return 8 * 2 * size**3 / best_seconds(eight, a, b) / 1e9


def main() -> None:
  """GB/s are of reading and writing an array, and of reading it."""
  x = jnp.zeros(2**27, jnp.float32)
  limits = {'float32': gflops(jnp.float32), 'bfloat16': gflops(jnp.bfloat16)}
  limits['gigabytes_per_second'] = 2 * x.nbytes / best_seconds(lambda x: x + 1, x) / 1e9
  limits['gigabytes_read_per_second'] = x.nbytes / best_seconds(jnp.sum, x) / 1e9
  print(json.dumps(limits))


if __name__ == '__main__':
  main()
