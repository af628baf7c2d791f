"""Checkpoints of a run, using orbax: arrays and the JSON that describes them, saved together."""

import contextlib
import logging
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from adapt_jax.machine.processes import decide, explain
from adapt_jax.models.errors import reading
from adapt_jax.models.files import json_checksum
from adapt_jax.models.network.backend import on_cpu

_LIMIT_SECONDS = 24 * 3600  # of a write beside training; orbax gives it twenty minutes


class _Manager(ocp.CheckpointManager):
  """Does not check for SIGTERM: JAX counts these checks, and machine/preemption.py makes them."""

  def reached_preemption(self, step: int) -> bool:
    return False


class Checkpoints:
  """The numbered checkpoints of a workdir; the newest two are kept.

  A checkpoint gets its final name only when it is complete, so a kill or a full disk while saving leaves the
  previous one. Its JSON contains checksums of itself and of the arrays: orbax has none, and returns wrong
  numbers if a byte of a data file has changed. With `read_only` nothing is saved or cleaned up.

  On accelerators, arrays are written while the run goes on. On CPUs the run waits, since a write beside it
  would take its cores, and as much memory again as the arrays.
  """

  def __init__(self, directory: pathlib.Path, *, read_only: bool = False):
    self._directory, self._beside = directory.absolute(), not on_cpu()
    self._quiet = contextlib.ExitStack()  # while a checkpoint is written
    keep: dict[str, Any] = {'max_to_keep': 2, 'create': True, 'cleanup_tmp_directories': True}
    if read_only:  # the run may be active and save meanwhile
      keep = {'read_only': True}
    handlers = {'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()}
    with reading('', self._directory, 'move it away'), _one_error():  # orbax warns of `read_only`
      if not read_only:
        self._directory.mkdir(parents=True, exist_ok=True)  # orbax only logs that it cannot
      beside = ocp.AsyncOptions(timeout_secs=_LIMIT_SECONDS, create_directories_asynchronously=False)
      keep |= {'enable_async_checkpointing': self._beside, 'async_options': beside}
      options = ocp.CheckpointManagerOptions(**keep)
      self._manager = _Manager(self._directory, options=options, item_handlers=handlers)

  def latest(self) -> int | None:
    """Number of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, state: Any, meta: dict[str, Any]) -> None:
    """Saves under the next number. A save that fails leaves nothing.

    On CPUs it returns when the checkpoint is on disk. On accelerators it returns when the arrays are in the
    host's memory, so that a step may donate them; `wait`, which the next save calls, raises what then fails.
    """
    self.wait()
    number = decide(lambda: (self.latest() or 0) + 1)
    meta = {'meta': meta, 'arrays': _checksum(state)}
    meta['checksum'] = json_checksum(meta)
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    self._quiet.enter_context(_one_error())
    with self._none_left():
      self._manager.save(number, args=items)
    if not self._beside:
      self.wait()

  def check(self) -> None:
    """Raises the error of a write beside training, as soon as it is known."""
    with self._none_left():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Returns when the last checkpoint is on disk, and raises the error of its write."""
    with self._none_left():
      self._manager.wait_until_finished()
    self._quiet.close()

  @contextlib.contextmanager
  def _none_left(self) -> Iterator[None]:
    """Leaves no unfinished checkpoint if the block fails."""
    try:
      yield
    except Exception as error:  # any, raised again: those of orbax and tensorstore share no class
      self._quiet.pop_all()  # not closed: what else failed must stay unsaid to the end
      warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)  # or never began
      explain(error)
      self._remove_unfinished()
      raise

  def _remove_unfinished(self) -> None:
    """Removes unfinished checkpoints; orbax does so only at its next start, and the disk may be full."""
    for _ in range(20):  # writes still in progress create the directory again
      for unfinished in self._directory.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(unfinished, ignore_errors=True)
      time.sleep(0.05)
      if not any(self._directory.glob('*.orbax-checkpoint-tmp*')):
        return

  def _read(self, number: int) -> contextlib.AbstractContextManager[None]:
    path = self._directory / str(number)
    return reading('the checkpoint', path, 'delete this directory to resume from the previous one')

  def meta(self, number: int) -> dict[str, Any]:
    """The JSON of a checkpoint, from which the target of `restore` is built."""
    return self._read_meta(number)[0]

  def _read_meta(self, number: int) -> tuple[dict[str, Any], int]:
    """The JSON of a checkpoint, and the checksum of its arrays."""
    with self._read(number), _one_error():
      args = ocp.args.Composite(meta=ocp.args.JsonRestore())
      meta: dict[str, Any] = self._manager.restore(number, args=args)['meta']
      if meta.pop('checksum') != json_checksum(meta):
        raise ValueError('the checksum of its JSON differs')
      return meta['meta'], meta['arrays']

  def restore(self, number: int, target: Any) -> Any:
    """The arrays of a checkpoint, checked against `target`, a pytree of `jax.ShapeDtypeStruct`.

    Raises InputError if a shape or dtype differs, since orbax casts dtypes silently.
    """
    _, wanted = self._read_meta(number)
    with self._read(number), _one_error():
      state = self._restore(number, target)
      if _checksum(state) != wanted:
        raise ValueError('the checksum of its arrays differs')
    return state

  def _restore(self, number: int, target: Any) -> Any:
    stored = self._manager.item_metadata(number)['state']
    wanted = dict(_paths(target))
    found = {p: (tuple(m.shape), np.dtype(m.dtype)) for p, m in _paths(stored)}
    for path, leaf in wanted.items():
      if found.get(path) != (shape := (tuple(leaf.shape), np.dtype(leaf.dtype))):
        raise ValueError(f'{path} is {found.get(path, "absent")}, and not {shape}, as in this run')
    # Without a sharding, orbax puts an array on the devices it was saved from, which may no longer exist.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), target
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return self._manager.restore(number, args=args)['state']

  def keep(self, newest: int) -> None:
    """Removes all but so many of the newest checkpoints, and the directory with the last; after `close`."""
    numbers = sorted(int(path.name) for path in self._directory.glob('[0-9]*') if path.name.isdigit())
    for number in numbers[: len(numbers) - newest]:
      shutil.rmtree(self._directory / str(number))
    if not newest:
      shutil.rmtree(self._directory, ignore_errors=True)

  def close(self) -> None:
    self.wait()
    self._manager.close()


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
  """Raises one error if reads or writes fail together, without logging or printing other tracebacks.

  Those arrive late, when orbax's futures are freed, so after a failure they stay unsaid.
  """
  asyncio, absl = logging.getLogger('asyncio'), logging.getLogger('absl')
  before, levels = sys.unraisablehook, (asyncio.level, absl.level)

  def hook(unraisable: Any) -> None:
    if not str(unraisable.exc_value).startswith(('Event loop is closed', 'Encountered error while reading')):
      before(unraisable)

  sys.unraisablehook = hook
  asyncio.setLevel(logging.CRITICAL)
  absl.setLevel(logging.CRITICAL + 1)
  yield
  asyncio.setLevel(levels[0])
  absl.setLevel(levels[1])
  sys.unraisablehook = before


def _checksum(tree: Any) -> int:
  """Σ of all numbers' bits modulo 2^32, leaf k times 31^k: changing any one number changes it.

  Independent of the sharding. Computed on the host: a device would need a compile for each of many shapes.
  """
  total = 0
  for leaf in reversed(jax.tree.leaves(tree)):
    total *= 31
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        data = shard.data
        if shard.device.platform != 'cpu':
          # A copy, since JAX keeps an array's host values with the array: all would stay in host memory.
          data = jax.device_put(data, may_alias=False)
        array = np.asarray(data)
        total += int(array.view(f'uint{8 * array.itemsize}').sum(dtype=np.uint32))
  return int(multihost_utils.process_allgather(np.uint32(total % 2**32)).sum(dtype=np.uint32))


def _paths(tree: Any) -> list[tuple[str, Any]]:
  """(path, leaf) pairs; tuples, lists and string-keyed dicts of indices give the same path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]
