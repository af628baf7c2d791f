"""TensorBoard: curves as event files in `tensorboard/` of the workdir.

The package `tensorboard` writes them without TensorFlow or PyTorch.
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt_jax.reports import trackers
from adapt_jax.reports.trackers import Row


class Tracker:
  """Event files, rewritten from the log so far, so that a resume duplicates no point.

  Points that were logged before have the time of the resume; their steps are unchanged.
  """

  def __init__(self, workdir: pathlib.Path, settings: dict[str, Any], rows: Sequence[Row]):
    from tensorboard.summary import Writer

    directory = workdir / 'tensorboard'
    shutil.rmtree(directory, ignore_errors=True)
    self._writer = Writer(str(directory))
    for row in rows:
      self._add(row)
    self._writer.flush()

  def write(self, row: Row) -> None:
    """Adds one line of the log and flushes it to disk."""
    self._add(row)
    self._writer.flush()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()

  def _add(self, row: Row) -> None:
    with np.errstate(over='ignore'):  # a perplexity beyond fp32 becomes infinity
      for tag, value in trackers.scalars(row).items():
        self._writer.add_scalar(tag, value, row['step'])
