"""Where `train.remat` is auto: whether a step recomputes whole layers, by the compiler's own plan of it."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from adapt_jax.config.options import TrainOptions
from adapt_jax.machine.mesh import bytes_of

P = TypeVar('P')

# Of a device's memory that a step may take: a program takes its temporary memory in one piece, which the rest
# must leave free, and no plan counts what cuDNN and NCCL take.
_SHARE = 0.9


def chosen(options: TrainOptions, compile: Callable[[TrainOptions], P], fit: Callable[[P], bool]) -> P:
  """compile(options) with `remat` as asked or, if auto, only where the program without it does not fit."""
  if options.remat != 'auto':
    return compile(options)
  try:
    program = compile(dataclasses.replace(options, remat='False'))
    if fit(program):
      return program
  except jax.errors.JaxRuntimeError as error:  # the compiler of TPUs itself refuses what does not fit
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
  return compile(dataclasses.replace(options, remat='True'))


def fits(size: float, memory: float) -> bool:
  """Whether so many bytes fit a device with so much memory; 0: its memory is not known, as of a CPU's."""
  return not memory or size <= _SHARE * memory


def memory() -> int:
  """Bytes that JAX may use of a device; 0 if that is not known, as on CPUs."""
  return _stats().get('bytes_limit', 0)


def _stats() -> dict[str, int]:
  return jax.local_devices()[0].memory_stats() or {}


def others(*held: Any) -> int:
  """Bytes in use on a device beside these trees of arrays."""
  return max(_stats().get('bytes_in_use', 0) - bytes_of(held), 0)


def fits_here(program: Any, beside: int) -> bool:
  """Whether a compiled program fits this process's devices beside so many bytes."""
  plan = program.memory_analysis()
  results = plan.output_size_in_bytes - plan.alias_size_in_bytes
  own = plan.argument_size_in_bytes + plan.temp_size_in_bytes + results
  return fits(own + beside, memory())
