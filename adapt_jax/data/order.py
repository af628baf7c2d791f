"""The order of training rows: shuffled epochs, sources mixed by weight, all determined by (seed, step)."""

from collections.abc import Sequence

import numpy as np

_SLOTS = 2**16  # of a round, shared by the sources in proportion to their weights, which are rounded to this
_ROUNDS = 8  # four make a Feistel network pseudorandom (Luby and Rackoff, 1988); small sets need more
_GOLDEN = 0x9E3779B97F4A7C15


class Order:
  """Rows of several groups, mixed by weight; each group is shuffled in its own epochs.

  A row's number is its index when all groups are concatenated. Nothing is stored per row, and all steps
  cost the same.

  Args:
    counts: rows of each group; no rows are taken from a group whose weight is 0.
    weights: weights of the groups; each group's share of all rows seen is its share of their sum.
    batch: rows per step.
  """

  def __init__(self, counts: Sequence[int], weights: Sequence[float], *, batch: int, seed: int):
    self._counts = np.array(counts, np.int64)
    self._bases = np.cumsum(self._counts) - self._counts
    self._batch, self._seed = batch, seed
    shares = np.array(weights) / sum(weights)
    self._quotas = np.where(shares > 0, np.maximum(1, np.round(shares * _SLOTS)), 0).astype(np.int64)
    group = np.repeat(np.arange(len(counts)), self._quotas)
    rank = np.concatenate([np.arange(quota) for quota in self._quotas])
    # Each group is spread evenly over the round, so that every batch has its share.
    order = np.argsort((rank + 0.5) / self._quotas[group], kind='stable')
    self._group, self._rank = group[order], rank[order]

  def rows(self, step: int) -> np.ndarray:
    """The rows of batch number `step`: int64 [batch]. Each epoch of a group visits each of its rows once."""
    rounds, slots = np.divmod(np.arange(step * self._batch, (step + 1) * self._batch), len(self._group))
    group = self._group[slots]
    counts = self._counts[group]
    epochs, places = np.divmod(rounds * self._quotas[group] + self._rank[slots], counts)
    keys = np.full(group.shape, self._seed, np.uint64)
    for part in (group, epochs):
      keys = _mix(_mix(keys) + part.astype(np.uint64))
    return self._bases[group] + _shuffle(places, counts, keys)


def _shuffle(places: np.ndarray, counts: np.ndarray, keys: np.ndarray) -> np.ndarray:
  """Applies a keyed permutation of 0 … count-1 to each place: int64, of the arguments' shape.

  A Feistel network permutes the numbers below side², the first square not below count; a result that is too
  large is permuted again until it is not (cycle walking; Black and Rogaway, 2002).
  """
  sides = np.ceil(np.sqrt(counts)).astype(np.int64)
  found, todo = places.copy(), np.arange(len(places))
  while len(todo):
    found[todo] = _feistel(found[todo], sides[todo], keys[todo])
    todo = todo[found[todo] >= counts[todo]]
  return found


def _feistel(numbers: np.ndarray, sides: np.ndarray, keys: np.ndarray) -> np.ndarray:
  left, right = np.divmod(numbers.astype(np.uint64), sides := sides.astype(np.uint64))
  for index in range(_ROUNDS):
    round_keys = _mix(keys + np.uint64(index * _GOLDEN % 2**64))
    left, right = right, (left + _mix(round_keys + right) % sides) % sides
  return (left * sides + right).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
  """SplitMix64's finaliser (Steele et al., 2014): a bijection of uint64; every bit affects all others."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))
