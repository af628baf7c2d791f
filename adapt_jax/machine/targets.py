"""Accelerators that programs can be compiled for on a machine that has none, and their published figures.

JAX compiles ahead of time for devices that are only described (`jax.experimental.topologies`), with the
compiler of the platform: CUDA's comes with the packages `jax-cuda12-plugin` and `jax-cuda12-pjrt`, that of
TPUs with `libtpu`. No driver, card or other package is needed. Kernels that are chosen by timing them on a
card (autotuning) are not chosen so here; memory, collectives and precision are those of the platform.
"""

import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from adapt_jax.models.errors import InputError
from adapt_jax.models.network.backend import Platform


@dataclasses.dataclass(frozen=True)
class Target:
  """An accelerator by its maker's figures, or this CPU by what was measured.

  Attributes:
    platform: `cuda`, `tpu` or `cpu`.
    memory_gb: 10^9 bytes.
    peak_tflops: of dense bfloat16 products.
    exact_tflops: of float32 products at full precision, which GPUs compute without tensor cores, and TPUs in
      six products in bfloat16.
    memory_gb_per_s: between the device and its memory.
    link_gb_per_s: that a device sends to others of its host or slice, in one direction.
    kind: the name of a TPU topology, or compute capability, cores, L2 bytes and GHz of a GPU.
  """

  platform: str
  memory_gb: float
  peak_tflops: float
  exact_tflops: float
  memory_gb_per_s: float
  link_gb_per_s: float
  kind: Any = None

  @property
  def compiled_for(self) -> Platform:
    """What its programs are traced for."""
    return Platform(self.platform, self.kind[0]) if self.platform == 'cuda' else Platform(self.platform)


_H100 = Target('cuda', 80, 989, 67, 3350, 450, ((9, 0), 132, 50 * 2**20, 1.98, 'NVIDIA H100 80GB HBM3'))
# NVIDIA's data sheets of the SXM cards; Google's pages of each TPU ("Cloud TPU ... system architecture").
TARGETS = {
  'cpu': dataclasses.replace(_H100, platform='cpu', kind=None),  # simulated devices, with an H100's figures
  'h100': _H100,
  'h200': Target('cuda', 141, 989, 67, 4800, 450, ((9, 0), 132, 50 * 2**20, 1.98, 'NVIDIA H200')),
  'a100': Target('cuda', 80, 312, 19.5, 2039, 300, ((8, 0), 108, 40 * 2**20, 1.41, 'NVIDIA A100-SXM4-80GB')),
  'tpu-v5e': Target('tpu', 16, 197, 197 / 6, 819, 200, 'v5e'),
  'tpu-v5p': Target('tpu', 95, 459, 459 / 6, 2765, 600, 'v5p'),
  'tpu-v6e': Target('tpu', 32, 918, 918 / 6, 1640, 400, 'v6e'),
}
_MODULES = {'cuda': ('jax_plugins.xla_cuda12',), 'tpu': ('libtpu',)}
_GPUS_PER_HOST = 8
# A GpuTargetConfigProto of XLA. What all three cards share is written out.
_GPU = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores}
  fpus_per_core: {fpus}
  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  l2_cache_size: {l2}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_per_core}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
"""


def missing(target: Target) -> str:
  """What to install to compile for the target; empty if nothing is missing."""
  if target.platform == 'cpu' or all(map(_installed, _MODULES[target.platform])):
    return ''
  return "pip install 'adapt-jax[estimate]'"


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its package
    return False


def devices(target: Target, count: int) -> list[Any]:
  """So many devices of the target, to compile for. Raises InputError if a TPU slice has another number."""
  if target.platform == 'cuda':
    hosts = -(-count // _GPUS_PER_HOST)
    topology = topologies.get_topology_desc(
      platform='cuda',
      target_config=_gpu(target),
      topology=f'1x{hosts}x{-(-count // hosts)}',
    )
  else:
    # libtpu otherwise looks for a TPU's metadata server, and for other processes that use the TPU.
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', 'true')
    topology = topologies.get_topology_desc(platform='tpu', topology_name=slice_name(target, count))
  return list(topology.devices)[:count]


def slice_name(target: Target, count: int) -> str:
  """The topology with at least this many TPUs, such as v5p:2x2x2: no axis is over twice another."""
  sizes, most = ([2, 2, 1], 8192) if target.kind == 'v5p' else ([2, 2], 256)
  if count & (count - 1) or count > most:
    raise InputError(
      f'estimate.devices = {count}: a slice of these TPUs has a power of two of them, at most {most}'
    )
  while math.prod(sizes) < count:
    smallest = min(sizes)
    sizes[max(i for i, size in enumerate(sizes) if size == smallest)] *= 2
  return f'{target.kind}:{"x".join(map(str, sorted(sizes) if min(sizes) > 1 else sizes))}'


def _gpu(target: Target) -> str:
  (major, minor), cores, l2, clock, name = target.kind
  hopper = major >= 9
  return _GPU.format(
    name=name, major=major, minor=minor, cores=cores, clock=clock, l2=l2,
    fpus=128 if hopper else 64,
    bandwidth=int(target.memory_gb_per_s * 1e9),
    memory=int(target.memory_gb * 1e9),
    shared=(227 if hopper else 163) * 1024,
    shared_per_core=(228 if hopper else 164) * 1024,
  )  # fmt: skip


def simulate(devices: int) -> None:
  """Makes JAX see only so many CPU devices (0: the actual devices); call it before any other use of JAX."""
  if devices:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', devices)
