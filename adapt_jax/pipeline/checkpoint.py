"""Checkpoints of a run through orbax: arrays and the JSON that describes them, saved together."""

import contextlib
import json
import logging
import pathlib
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from adapt_jax.machine.processes import decide
from adapt_jax.models.errors import InputError


class _Manager(ocp.CheckpointManager):
  """Does not look for SIGTERM: JAX counts the calls that ask for it, and machine/preemption.py makes them."""

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpoints:
  """The numbered checkpoints of a workdir; the newest two are kept.

  A checkpoint appears under its final name only when it is complete, so a kill or a full disk while saving
  leaves the one before. Its JSON holds checksums of itself and of the arrays: orbax has none, and hands out
  other numbers where a byte of a data file has changed. With `read_only` nothing is saved or tidied up.
  """

  def __init__(self, directory: pathlib.Path, *, read_only: bool = False):
    self._directory = directory.absolute()
    keep: dict[str, Any] = {'max_to_keep': 2, 'create': True, 'cleanup_tmp_directories': True}
    if read_only:  # the run may go on meanwhile, and save
      keep = {'read_only': True}
    self._manager = _Manager(
      self._directory,
      options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **keep),
      item_handlers={'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()},
    )

  def latest(self) -> int | None:
    """Number of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, state: Any, meta: dict[str, Any]) -> None:
    """Saves under the next number; returns when it is on disk. A save that fails leaves nothing."""
    number = decide(lambda: (self.latest() or 0) + 1)
    meta = {'meta': meta, 'arrays': _checksum(state)}
    meta['checksum'] = _checksum_json(meta)
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    try:
      with _one_error():
        self._manager.save(number, args=items)
        self._manager.wait_until_finished()
    except Exception:  # raised on, whatever it is: orbax and tensorstore share no class
      self._remove_unfinished()
      raise

  def _remove_unfinished(self) -> None:
    """Orbax does it only when it starts again, and the disk may be full."""
    for _ in range(20):  # writes that are still on their way make the directory anew
      for unfinished in self._directory.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(unfinished, ignore_errors=True)
      time.sleep(0.05)
      if not any(self._directory.glob('*.orbax-checkpoint-tmp*')):
        return

  def meta(self, number: int) -> dict[str, Any]:
    """The JSON of a checkpoint, from which the target of `restore` is built."""
    meta: dict[str, Any] = self._read_meta(number)['meta']
    return meta

  def _read_meta(self, number: int) -> dict[str, Any]:
    with self._readable(number):
      args = ocp.args.Composite(meta=ocp.args.JsonRestore())
      meta: dict[str, Any] = self._manager.restore(number, args=args)['meta']
      if meta.pop('checksum') != _checksum_json(meta):
        raise ValueError('checksum of the JSON')
    return meta

  @contextlib.contextmanager
  def _readable(self, number: int) -> Iterator[None]:
    """Any failure to read checkpoint `number` as an InputError that tells what to do."""
    try:
      with _one_error():
        yield
    except InputError:
      raise
    except Exception as error:  # orbax raises even bare Exceptions for a file that is damaged
      raise InputError(
        f'{self._directory / str(number)}: the checkpoint cannot be read ({type(error).__name__}): delete '
        f'this directory to go on from the one before'
      ) from error

  def restore(self, number: int, target: Any) -> Any:
    """The arrays of a checkpoint, checked against `target`, a pytree of `jax.ShapeDtypeStruct`.

    Raises InputError where a shape or dtype differs: orbax casts dtypes silently.
    """
    wanted = self._read_meta(number)['arrays']
    with self._readable(number):
      state = self._restore(number, target)
      if _checksum(state) != wanted:
        raise ValueError('checksum of the arrays')
    return state

  def _restore(self, number: int, target: Any) -> Any:
    stored = self._manager.item_metadata(number)['state']
    wanted = dict(_paths(target))
    found = {p: (tuple(m.shape), np.dtype(m.dtype)) for p, m in _paths(stored)}
    for path, leaf in wanted.items():
      if found.get(path) != (tuple(leaf.shape), np.dtype(leaf.dtype)):
        raise InputError(
          f'{self._directory}/{number}: {path} is {found.get(path, "absent")}, this run needs '
          f'{(tuple(leaf.shape), str(leaf.dtype))}: the checkpoint is of another model, or damaged: use '
          f'another workdir, or delete this directory to go on from the one before'
        )
    # Without a place orbax puts an array where it was saved, on devices that there may not be any more.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), target
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return self._manager.restore(number, args=args)['state']

  def close(self) -> None:
    self._manager.close()


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
  """Of reads or writes that fail together no traceback is logged or printed; one error is raised."""

  def hook(unraisable: Any) -> None:  # what ends after orbax gave up
    if not str(unraisable.exc_value).startswith(('Event loop is closed', 'Encountered error while reading')):
      sys.__unraisablehook__(unraisable)

  sys.unraisablehook = hook
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  logging.disable(logging.CRITICAL)
  try:
    yield
  finally:
    logging.disable(logging.NOTSET)


def _checksum(tree: Any) -> int:
  """Σ of all numbers' bits modulo 2^32, leaf k times 31^k: any one that changes, changes it.

  The same however the arrays are sharded. On the host: on a device each of the many shapes would be compiled.
  """
  total = 0
  for leaf in reversed(jax.tree.leaves(tree)):
    total *= 31
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        data = shard.data
        if shard.device.platform != 'cpu':
          # A copy, for JAX keeps with an array what it has fetched of it: all would stay in host memory.
          data = jax.device_put(data, may_alias=False)
        array = np.asarray(data)
        total += int(array.view(f'uint{8 * array.itemsize}').sum(dtype=np.uint32))
  return int(multihost_utils.process_allgather(np.uint32(total % 2**32)).sum(dtype=np.uint32))


def _checksum_json(values: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _paths(tree: Any) -> list[tuple[str, Any]]:
  """(path, leaf) pairs; tuples, lists and string-keyed dicts of indices give the same path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]
