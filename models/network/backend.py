"""For which kind of device programs are made: forms of some operations and the compiler's options differ."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

_planned_for: list[str] = []

# XLA orders operations for a CPU so that many can run at once, and then keeps several times the memory alive;
# in the order that saves memory the training step is no slower.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def on_cpu() -> bool:
  """Whether what is traced now is to run on a CPU."""
  return (_planned_for[-1] if _planned_for else jax.default_backend()) == 'cpu'


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
  """What is traced inside takes the forms of that platform: of `gpu`, say, in plans made on a CPU."""
  _planned_for.append(platform)
  try:
    yield
  finally:
    _planned_for.pop()


def compiler_options() -> dict[str, Any]:
  """What to compile with on the present platform."""
  return _CPU_OPTIONS if jax.default_backend() == 'cpu' else {}


def loop_options() -> dict[str, Any]:
  """For a program that loops over layers or tokens: on a CPU XLA would convert all weights to fp32 before."""
  if jax.default_backend() != 'cpu':
    return {}
  return {'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}


def compute_dtype(name: str) -> Any:
  """`model.dtype` as a dtype; auto is float32 on CPU, for the same figures on any, else bfloat16."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)
