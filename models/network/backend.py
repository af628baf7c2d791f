"""The platform to compile for: the form of some operations and the compiler options depend on it."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Platform:
  """What code is compiled for.

  Attributes:
    name: `cpu`, `tpu`, `cuda`, or another accelerator's, such as `gpu`, for which no kernels are chosen.
    capability: the compute capability of a CUDA device, such as (9, 0).
  """

  name: str
  capability: tuple[int, int] = (0, 0)


CPU = Platform('cpu')
_made_for: list[Platform] = []
_CUDNN_VERSION = 91_000  # 9.10: that of `machine.targets`

# By default XLA schedules operations on a CPU for concurrency, which uses several times the memory; with the
# memory-optimized schedule the training step is no slower.
_CPU_OPTIONS = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


def on_cpu() -> bool:
  """Whether the code being traced is to run on a CPU."""
  return platform().name == 'cpu'


def on_tpu() -> bool:
  """Whether the code being traced is to run on a TPU."""
  return platform().name == 'tpu'


def platform() -> Platform:
  """What the code being traced is made for: what `made_for` names, otherwise this process's devices."""
  if _made_for:
    return _made_for[-1]
  device = jax.local_devices()[0]
  if 'cuda' not in device.client.platform_version:
    return Platform(device.platform)
  return Platform('cuda', _numbers(device.compute_capability))


@contextlib.contextmanager
def made_for(name: str, capability: tuple[int, int] = (0, 0)) -> Iterator[None]:
  """Code traced inside is made for that platform, which this machine need not have."""
  _made_for.append(Platform(name, capability))
  try:
    with _cudnn_of(capability) if name == 'cuda' else contextlib.nullcontext():
      yield
  finally:
    _made_for.pop()


@contextlib.contextmanager
def _cudnn_of(capability: tuple[int, int]) -> Iterator[None]:
  """JAX asks this process's library and device before it calls cuDNN: inside, for those of such a card."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  answers: dict[str, Any] = {
    'check_cudnn_version': lambda: _CUDNN_VERSION,
    'check_compute_capability': lambda least: capability >= _numbers(least),
    'is_cuda_compute_capability_equal': lambda other: capability == _numbers(other),
  }
  own = {name: getattr(cudnn, name) for name in answers}
  try:
    for name, answer in answers.items():
      setattr(cudnn, name, answer)
    yield
  finally:
    for name, check in own.items():
      setattr(cudnn, name, check)


def _numbers(capability: str) -> tuple[int, int]:
  major, minor = capability.split('.')
  return int(major), int(minor)


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
