"""The dtype of recovery training where `train.dtype` is auto: on a CPU, that of the faster products."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp

from adapt_jax.machine.processes import say
from adapt_jax.models.network.backend import compute_dtype, on_cpu
from adapt_jax.models.network.matmul import product

# How many times as fast a product in bfloat16 must be; a training step gains about half as much.
_WORTH, _ROUNDS = 1.25, 9


def chosen(name: str) -> str:
  """`RunOptions.training_dtype`, but not auto: what suits this machine, said in a line if it was measured."""
  if name != 'auto' or not on_cpu():
    return str(compute_dtype(name).name)
  times = speedup()
  name = 'bfloat16' if times >= _WORTH else 'float32'
  say(f'training in {name}: here a product in bfloat16 is {times:.1f} times as fast (train.dtype)')
  return name


@functools.cache
def speedup() -> float:
  """How many times as fast a product of a small model's MLP is in bfloat16, its fp32 weights cast first.

  The median of ratios of neighbours in time, since other work may run beside.
  """
  weight, multiply = jnp.ones((1536, 576)), jax.jit(product)
  wide, narrow = (jnp.ones((1024, 576), dtype) for dtype in (jnp.float32, jnp.bfloat16))

  def seconds(x: jax.Array) -> float:
    start = time.perf_counter()
    multiply(x, weight).block_until_ready()
    return time.perf_counter() - start

  ratios = [seconds(wide) / seconds(narrow) for _ in range(1 + _ROUNDS)]
  return statistics.median(ratios[1:])  # the first compiles
