"""The log's scalars as TensorBoard event files, where the extra `tensorboard` is installed.

`tensorboard` writes them by itself, without TensorFlow or PyTorch.
"""

import importlib.util
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from adapt_jax.config.values import TEXT

# Event -> the fields that become curves over its `step`: training steps or pruning steps.
_CURVES = {
  'train': ('loss', 'learning_rate', 'gradient_norm', 'tokens_per_second'),
  'prune': ('params', 'loss'),
}


def installed() -> bool:
  """Whether the extra is there."""
  return importlib.util.find_spec('tensorboard') is not None


def scalars(row: dict[str, Any]) -> dict[str, float]:
  """Tag -> value of one line of the log; perplexities are parted into dense, pruned and recovered."""
  if row['event'] == 'evaluate':
    text = row.get('text', TEXT)
    return {'/'.join(['perplexity', *([] if text == TEXT else [text]), row['of']]): row['perplexity']}
  return {f'{row["event"]}/{field}': row[field] for field in _CURVES.get(row['event'], ())}


class EventFiles:
  """Event files in `directory`, made anew from the log so far: after a resume no point is there twice.

  Points that were logged before carry the time of the resume; their steps are what they were.
  """

  def __init__(self, directory: pathlib.Path, rows: Iterable[dict[str, Any]]):
    from tensorboard.summary import Writer

    shutil.rmtree(directory, ignore_errors=True)
    self._writer = Writer(str(directory))
    for row in rows:
      self._add(row)
    self._writer.flush()

  def write(self, row: dict[str, Any]) -> None:
    """Adds one line of the log; it is on disk afterwards."""
    self._add(row)
    self._writer.flush()

  def _add(self, row: dict[str, Any]) -> None:
    with np.errstate(over='ignore'):  # a perplexity beyond fp32 is infinity there
      for tag, value in scalars(row).items():
        self._writer.add_scalar(tag, value, row['step'])
