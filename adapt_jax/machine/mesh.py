"""The device mesh of a run, its requirements on the run, and the placement of arrays on it.

`models.network.sharding` defines how arrays are split. For one device there is no mesh: nothing is placed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh

from adapt_jax.config.options import MeshOptions, RunOptions
from adapt_jax.machine.progress import phase
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.formats.source import Source
from adapt_jax.models.network import sharding
from adapt_jax.models.network.backend import compiler_options, platform
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import AXES, row_sharding, row_shards, shardings


def mesh_shape(options: MeshOptions, devices: int) -> dict[str, int]:
  """Size of every axis, with −1 filled in; InputError if `devices` cannot form such a mesh."""
  sizes = {axis: getattr(options, axis) for axis in AXES}
  given = math.prod(size for size in sizes.values() if size > 0)
  filled = {axis: devices // given if size == -1 else size for axis, size in sizes.items()}
  if math.prod(filled.values()) != devices:
    text = ', '.join(f'{axis} = {size}' for axis, size in sizes.items())
    raise InputError(f'mesh ({text}) does not fit the {devices} devices: set one axis to -1 to use all')
  return filled


def make_mesh(options: MeshOptions, described: list[Any] | None = None) -> Mesh | None:
  """The mesh of all devices of all processes, None for a single one; or that of described devices.

  Raises InputError if the devices cannot form it.
  """
  devices = described or jax.devices()
  sizes = tuple(mesh_shape(options, len(devices)).values())
  if not described and len(devices) == 1:
    return None
  kinds = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices > 1:  # which jax.make_mesh refuses; the hosts of a GPU cluster are slices too
    return Mesh(_over_slices(sizes, slices, devices), AXES, axis_types=kinds)
  return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def _over_slices(sizes: tuple[int, ...], slices: int, devices: list[Any]) -> Any:
  """The devices in the order of a mesh over several slices, which the first axes span."""
  across, left = [], slices
  for size in sizes:
    across.append(math.gcd(size, left))
    left //= across[-1]
  within = [size // number for size, number in zip(sizes, across, strict=True)]
  with reading(f'mesh of {len(devices)} devices in {slices} hosts', remedy='give each host as many devices'):
    return create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def check_platform(options: MeshOptions) -> None:
  """Checks that this machine's devices are of `mesh.platform`. Raises InputError."""
  if options.platform and options.platform != (found := platform().name):
    raise InputError(
      f'mesh.platform = {options.platform!r}, but JAX finds devices of {found}: check the driver, what the '
      'container sees (NVIDIA_VISIBLE_DEVICES), and the packages of JAX'
    )


def devices_text() -> str:
  """The devices and processes of the run, such as '8 NVIDIA H100 80GB HBM3 (gpu), 1 process'."""
  devices, processes = jax.devices(), jax.process_count()
  kind, name = devices[0].device_kind, devices[0].platform
  named = name if kind == name else f'{kind} ({name})'
  return f'{len(devices)} {named}, {processes} process{"es" * (processes > 1)}'


def check_model(config: ModelConfig) -> None:
  """Checks that the current mesh can split this model. Raises InputError."""
  mesh = sharding.mesh()
  if mesh is None:
    return
  widths = [('fsdp', config.hidden_size, 'numbers of the hidden size')]
  for i, shape in enumerate(config.layers):
    widths.append(('tensor', shape.num_kv_heads, f'KV heads of layer {i}'))
    widths.append(('tensor', shape.ffn, f'MLP channels of layer {i}'))
  for axis, width, name in widths:
    if width % (size := mesh.shape[axis]):
      raise InputError(f'mesh.{axis} = {size} does not divide the {width} {name}: lower it')


def check_batches(options: RunOptions) -> None:
  """Checks that the current mesh can split the run's batches by rows. Raises InputError."""
  if options.prune.prunes:
    check_rows('prune.calibration.samples', options.prune.calibration.samples)
  if options.train.tokens:
    check_rows('train.batch', options.train.batch)


def check_rows(field: str, count: int) -> None:
  """Checks that the current mesh can split so many rows. Raises InputError."""
  if count % (shards := row_shards()):
    raise InputError(
      f'{field} = {count} must be a multiple of the {shards} devices that split rows (mesh.data x mesh.fsdp)'
    )


def rows_at_once(count: int, most: int) -> int:
  """Rows of a micro-batch over all devices: at most `most` per device, and a divisor of `count`.

  `count` must be a multiple of `row_shards()`.
  """
  own = count // row_shards()
  return row_shards() * max(n for n in range(1, min(most, own) + 1) if own % n == 0)


def put_rows(ids: np.ndarray, read: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> tuple[jax.Array, ...]:
  """The arrays [len(ids), ...] that `read(ids)` returns, split by rows; a process reads only its own rows."""
  split = row_sharding()
  if split is None:
    return tuple(jnp.asarray(x) for x in read(ids))
  slices = {d: index[0] for d, index in split.addressable_devices_indices_map((len(ids),)).items() if index}
  parts = {(s.start, s.stop): read(ids[s]) for s in {(s.start, s.stop): s for s in slices.values()}.values()}

  def place(k: int) -> jax.Array:
    shares = [jax.device_put(parts[s.start, s.stop][k], device) for device, s in slices.items()]
    shape = (len(ids), *shares[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, split, shares)

  return tuple(place(k) for k in range(len(next(iter(parts.values())))))


def jit(fn: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = (), once: bool = False) -> Any:
  """`jax.jit(fn)` for arguments like `args`, with results placed by their leaf names.

  once: `fn` mainly moves data and runs only once. On CPU it is then compiled without optimisation, in a third
  of the time, and runs as fast, since it is limited by memory; its schedule uses the least memory.
  """
  settings: dict[str, Any] = {'donate_argnums': donate_argnums}
  if once and jax.default_backend() == 'cpu':
    settings['compiler_options'] = compiler_options() | {'xla_backend_optimization_level': 0}
  if sharding.mesh() is not None:
    settings['out_shardings'] = shardings(jax.eval_shape(fn, *args))
  return jax.jit(fn, **settings)


def bytes_of(tree: Any) -> int:
  """Bytes that a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings, takes on one device."""

  def size(x: Any) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

  return sum(size(x) for x in jax.tree.leaves(tree))


def load_source(source: Source, dtype: Any) -> Params:
  """Loads parameters onto the mesh in `dtype`, or if None as stored; a process reads only its own slices."""
  with phase(f'reading {source.name}'):
    return source.load_params(dtype, shardings(source.abstract_params(dtype)))
