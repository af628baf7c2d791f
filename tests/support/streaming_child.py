"""One of two processes with two devices each, run by test_streaming.py: loads, saves, decisions."""

import dataclasses
import pathlib
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from adapt_jax.export.hf import write_hf
from adapt_jax.machine.processes import OutputClosed, decide
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.hf_weights import load_params, save_params
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.llama import Params, abstract_params
from adapt_jax.models.network.sharding import AXES, shardings
from tests.support.helpers import random_params
from tests.support.streaming import CountingReader, divisible_config


def mesh(tensor: int, fsdp: int, devices: list[jax.Device]) -> Mesh:
  """The tensor axis is the outer one, so that it too is split over the processes."""
  return Mesh(np.array(devices).reshape(tensor, fsdp).T[None], AXES, axis_types=(AxisType.Auto,) * 3)


def placed(config: ModelConfig, mesh: Mesh) -> Params:
  with jax.set_mesh(mesh):
    return shardings(abstract_params(config))


def check_bits(sharded: Params, plain: Params) -> None:
  def check(array, whole):
    assert array.shape == whole.shape and array.dtype == whole.dtype
    for shard in array.addressable_shards:
      assert np.asarray(shard.data).tobytes() == np.asarray(whole)[shard.index].tobytes()

  jax.tree.map(check, sharded, plain)


def check_load(source: Source, mesh: Mesh, part: int, dtype: str | None) -> Params:
  """`part` is the number of processes among which the mesh splits the matrices."""
  config, reader = source.config, CountingReader(source.reader, source.config)
  wanted = placed(config, mesh)
  params = load_params(config, reader, dtype, wanted)
  check_bits(params, source.load_params(dtype))
  described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
  assert source.abstract_params(dtype, wanted) == described
  for name, times in reader.times.items():
    whole = times.ndim == 1 and not (name.endswith('.bias') and mesh.shape['tensor'] > 1)
    assert times.max() == 1, f'{name}: a byte is read twice'
    assert times.sum() * (1 if whole else part) == times.size, f'{name}: {times.sum()} of {times.size}'
  # At once alive: this process's part of a tensor, and where slices are cast only one of them.
  parts = mesh.size if dtype else part
  assert reader.peak <= reader.largest() // parts, (reader.peak, reader.largest())
  return params


def check_save(mesh: Mesh, out: pathlib.Path) -> None:
  """The same bytes as of a plain model, one tensor held at a time, whether files are written or not."""
  config = dataclasses.replace(divisible_config('llama'), vocab_size=512, hidden_size=512)
  params = random_params(config)
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  shard_bytes = max(sizes)
  assert sum(sizes) > 3 * shard_bytes
  # What the arrays themselves take grows in use: about 4 kB each.
  slack = 10_000 * len(sizes)
  assert slack < shard_bytes / 4
  for directory in ('plain', 'sharded'):
    (out / directory).mkdir(parents=True)
  for directory in (out / 'sharded', None):
    sharded = jax.device_put(params, placed(config, mesh))
    tracemalloc.start()
    save_params(config, sharded, directory, shard_bytes=shard_bytes)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert left < slack, left
    assert peak < max(sizes) + slack, (peak, max(sizes))
  save_params(config, params, out / 'plain', shard_bytes=shard_bytes)
  files = {p.name: p.read_bytes() for p in (out / 'plain').iterdir()}
  assert len(files) > 3 and files == {p.name: p.read_bytes() for p in (out / 'sharded').iterdir()}


def check_decisions(process: int) -> None:
  """What the first finds, or refuses, all have."""
  assert decide(lambda: {'sizes': [0.1 + process, None]}) == {'sizes': [0.1, None]}

  def closed() -> None:  # as in `| head`: the first process ends, and no other waits for it
    raise OutputClosed

  with pytest.raises((OutputClosed, InputError)) as error:
    decide(closed)
  assert error.type is (InputError if process else OutputClosed)


def main(process: int, port: int, checkpoints: pathlib.Path, out: pathlib.Path) -> None:
  jax.config.update('jax_num_cpu_devices', 2)
  jax.distributed.initialize(f'localhost:{port}', 2, process)
  assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
  here = mesh(1, 2, jax.local_devices())
  for path in sorted(checkpoints.iterdir()):
    source = open_source(str(path))
    check_load(source, here, 1, None)
    check_load(source, mesh(1, 4, jax.devices()), 2, 'float16')
    params = check_load(source, mesh(2, 2, jax.devices()), 2, None)
    # Only the first process may write.
    write_hf(source.config, params, out / f'{path.name}-{process}')
  check_decisions(process)
  check_save(here, out / f'files-{process}')


if __name__ == '__main__':
  main(int(sys.argv[1]), int(sys.argv[2]), *map(pathlib.Path, sys.argv[3:]))
