"""The platform to compile for: the form of some operations and the compiler options depend on it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

_planned_for: list[str] = []

# By default XLA schedules operations on a CPU for concurrency, which uses several times the memory; with the
# memory-optimized schedule the training step is no slower.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def on_cpu() -> bool:
  """Whether the code being traced is to run on a CPU."""
  return _platform() == 'cpu'


def on_tpu() -> bool:
  """Whether the code being traced is to run on a TPU."""
  return _platform() == 'tpu'


def _platform() -> str:
  return _planned_for[-1] if _planned_for else jax.default_backend()


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
  """Code traced inside is made for that platform, such as `gpu` for plans made on a CPU."""
  _planned_for.append(platform)
  try:
    yield
  finally:
    _planned_for.pop()


def compiler_options() -> dict[str, Any]:
  """Compiler options for the current platform."""
  return _CPU_OPTIONS if jax.default_backend() == 'cpu' else {}


def loop_options() -> dict[str, Any]:
  """Options for loops over layers or tokens: on a CPU, XLA would convert all weights to fp32 beforehand."""
  if jax.default_backend() != 'cpu':
    return {}
  return {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}


def compute_dtype(name: str) -> Any:
  """`model.dtype` as a dtype; auto is float32 on CPU, for equal results on all CPUs, else bfloat16."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)
