"""Scores that pruners of the same weights share: a scoring pass is not made twice."""

import collections
from collections.abc import Callable
from typing import Any

from adapt_jax.pruning.scores import Scores

_MOST_BYTES = 2**28  # of remembered scores: about 1,400 passes over a model of 135M parameters


class ScoreMemo:
  """Scores by all that they depend on, on the host; those used last are forgotten last.

  computed, remembered: how many scoring passes ran, and how many were answered from here.
  """

  def __init__(self, most_bytes: int = _MOST_BYTES):
    self._most, self._bytes = most_bytes, 0
    self._found: collections.OrderedDict[Any, Scores] = collections.OrderedDict()
    self.computed = self.remembered = 0

  def get(self, key: Any, compute: Callable[[], Scores]) -> Scores:
    """The scores of `key`, computed if they are not known."""
    if key in self._found:
      self._found.move_to_end(key)
      self.remembered += 1
      return self._found[key]
    scores = self._found[key] = compute()
    self.computed += 1
    self._bytes += _size(scores)
    while self._bytes > self._most:
      self._bytes -= _size(self._found.popitem(last=False)[1])
    return scores


def _size(scores: Scores) -> int:
  return sum(x.nbytes for x in scores if x is not None)
