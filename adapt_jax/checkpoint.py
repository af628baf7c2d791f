"""Checkpoints of a run through orbax: arrays and the JSON that describes them, saved together."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from models.errors import InputError


class Checkpoints:
  """The numbered checkpoints of a workdir; the newest two are kept.

  A checkpoint appears under its final name only when it is complete, so a kill while saving leaves
  the one before.
  """

  def __init__(self, directory: pathlib.Path):
    self._directory = directory.absolute()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=2, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
      ),
      item_handlers={'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()},
    )

  def latest(self) -> int | None:
    """Number of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, state: Any, meta: dict[str, Any]) -> None:
    """Saves under the next number; returns when it is on disk."""
    number = (self.latest() or 0) + 1
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    self._manager.save(number, args=items)
    self._manager.wait_until_finished()

  def meta(self, number: int) -> dict[str, Any]:
    """The JSON of a checkpoint, from which the target of `restore` is built."""
    with self._readable(number):
      return self._manager.restore(number, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']

  @contextlib.contextmanager
  def _readable(self, number: int) -> Iterator[None]:
    """Any failure to read checkpoint `number` as an InputError that tells what to do."""
    try:
      yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      if isinstance(error, InputError):
        raise
      raise InputError(
        f'{self._directory / str(number)}: the checkpoint cannot be read ({type(error).__name__}): delete '
        f'this directory to go on from the one before'
      ) from error

  def restore(self, number: int, target: Any) -> Any:
    """The arrays of a checkpoint, checked against `target`, a pytree of `jax.ShapeDtypeStruct`.

    Raises InputError where a shape or dtype differs: orbax casts dtypes silently.
    """
    with self._readable(number):
      return self._restore(number, target)

  def _restore(self, number: int, target: Any) -> Any:
    stored = self._manager.item_metadata(number)['state']
    wanted = dict(_paths(target))
    found = {p: (tuple(m.shape), np.dtype(m.dtype)) for p, m in _paths(stored)}
    for path, leaf in wanted.items():
      if found.get(path) != (tuple(leaf.shape), np.dtype(leaf.dtype)):
        raise InputError(
          f'{self._directory}/{number}: {path} is {found.get(path, "absent")}, this run needs '
          f'{(tuple(leaf.shape), str(leaf.dtype))}: the checkpoint is of another model'
        )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    return self._manager.restore(number, args=args)['state']

  def close(self) -> None:
    self._manager.close()


def _paths(tree: Any) -> list[tuple[str, Any]]:
  """(path, leaf) pairs; tuples, lists and string-keyed dicts of indices give the same path."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in leaves]
