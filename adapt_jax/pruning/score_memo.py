"""A cache of scores and corrections, shared by pruners of the same weights."""

import collections
from collections.abc import Callable
from typing import Any

import jax

from adapt_jax.pruning.scores import Scores

_MOST_BYTES = 2**28  # of cached scores: about 1,400 passes over a model of 135M parameters
_MOST_CHANGES = 2**30  # bytes of a cached correction: that of a model of 135M parameters has 150 MB
Changes = dict[str, Any]  # of weights, from a `compensate.Compensator`: an array by layer, or a list of them


class ScoreMemo:
  """A least-recently-used cache of scores on the host; the key is everything that scores depend on.

  computed, remembered: how many scoring passes ran, and how many were answered from the cache.
  """

  def __init__(self, most_bytes: int = _MOST_BYTES):
    self._most, self._bytes = most_bytes, 0
    self._found: collections.OrderedDict[Any, Scores] = collections.OrderedDict()
    self._last: tuple[Any, Changes] | None = None
    self.computed = self.remembered = 0

  def get(self, key: Any, compute: Callable[[], Scores]) -> Scores:
    """The scores of `key`, computed if they are not cached."""
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

  def changes(self, key: Any, compute: Callable[[], Changes]) -> Changes:
    """The correction of `key`, computed unless it was the last one requested."""
    if self._last is None or self._last[0] != key:
      self._last = None  # freed before the next one is computed
      found = compute()
      if sum(x.nbytes for x in jax.tree.leaves(found)) > _MOST_CHANGES:
        return found
      self._last = key, found
    return self._last[1]


def _size(scores: Scores) -> int:
  return sum(x.nbytes for x in scores if x is not None)
