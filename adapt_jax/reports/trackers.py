"""Trackers show the curves of runs in other programs: `tracker` names them.

Each gets the lines of the run's log. One that joins later, or after a resume, first gets the earlier lines.
"""

import importlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from adapt_jax.config.values import TEXT
from adapt_jax.models.errors import InputError

Row = dict[str, Any]

# Event -> the fields that become curves over its `step`: training steps or pruning steps.
_CURVES = {
  'train': ('loss', 'learning_rate', 'gradient_norm', 'tokens_per_second'),
  'prune': ('params', 'loss'),
}


class Tracker(Protocol):
  """Receives a run's log. Each module of this package named after a choice of `tracker` has one.

  settings: the options that the run's result depends on, in groups. rows: the log's lines so far.
  """

  def __init__(self, workdir: pathlib.Path, settings: dict[str, Any], rows: Sequence[Row]): ...

  def write(self, row: Row) -> None:
    """Adds the log's next line."""

  def close(self) -> None:
    """Ends the record; the run may continue later, in another process."""


def check(names: Sequence[str]) -> None:
  """Raises InputError if the package of a tracker is not installed."""
  for name in names:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # without an origin it is a mere directory of that name
      raise InputError(
        f'tracker has {name!r}, but the package {name} is not installed: install it with '
        f"pip install 'adapt-jax[{name}]', or leave the tracker out"
      )


def start(
  names: Sequence[str], workdir: pathlib.Path, settings: dict[str, Any], rows: Sequence[Row]
) -> list[Tracker]:
  """Starts these trackers. Raises InputError if one refuses to start."""
  modules = [importlib.import_module(f'adapt_jax.reports.{name}') for name in names]
  return [module.Tracker(workdir, settings, rows) for module in modules]


def scalars(row: Row) -> dict[str, float]:
  """Tag -> value of one line of the log; perplexities are split into dense, pruned and recovered."""
  if row['event'] == 'evaluate':
    text = row.get('text', TEXT)
    return {'/'.join(['perplexity', *([] if text == TEXT else [text]), row['of']]): row['perplexity']}
  return {f'{row["event"]}/{field}': row[field] for field in _CURVES.get(row['event'], ())}
