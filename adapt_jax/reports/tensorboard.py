"""Writes the log's scalars as TensorBoard event files, if the extra `tensorboard` is installed.

`tensorboard` writes them without TensorFlow or PyTorch.
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
  """Whether the extra is installed."""
  return importlib.util.find_spec('tensorboard') is not None


def scalars(row: dict[str, Any]) -> dict[str, float]:
  """Tag -> value of one line of the log; perplexities are split into dense, pruned and recovered."""
  if row['event'] == 'evaluate':
    text = row.get('text', TEXT)
    return {'/'.join(['perplexity', *([] if text == TEXT else [text]), row['of']]): row['perplexity']}
  return {f'{row["event"]}/{field}': row[field] for field in _CURVES.get(row['event'], ())}


class EventFiles:
  """Event files in `directory`, rewritten from the log so far, so that a resume duplicates no point.

  Points that were logged before have the time of the resume; their steps are unchanged.
  """

  def __init__(self, directory: pathlib.Path, rows: Iterable[dict[str, Any]]):
    from tensorboard.summary import Writer

    shutil.rmtree(directory, ignore_errors=True)
    self._writer = Writer(str(directory))
    for row in rows:
      self._add(row)
    self._writer.flush()

  def write(self, row: dict[str, Any]) -> None:
    """Adds one line of the log and flushes it to disk."""
    self._add(row)
    self._writer.flush()

  def _add(self, row: dict[str, Any]) -> None:
    with np.errstate(over='ignore'):  # a perplexity beyond fp32 becomes infinity
      for tag, value in scalars(row).items():
        self._writer.add_scalar(tag, value, row['step'])
