"""From layer importance to widths: the progressive schedule and the exact landing on a budget.

Paper section 3 (Adapt-Pruner); the docstrings give the formulas. NumPy only.
"""

import dataclasses
import heapq
from collections.abc import Iterable, Iterator

import numpy as np

from adapt_jax.config.declare import MAX_SPARSITY
from adapt_jax.models.config import ModelConfig
from adapt_jax.pruning import budget as budgets
from adapt_jax.pruning.attention_units import KV_GROUPS
from adapt_jax.pruning.budget import Budget

# The most steps that the landing may take on one set of scores, if a KV group had to be skipped.
MAX_LANDING = 2.0
# Position of removals in what a step should not prune: after all other removals.
SPARED = 1e18

# (position in the order, layer, is_kv, remaining width)
Removal = tuple[float, int, bool, int]


def normalise(importance: np.ndarray) -> np.ndarray:
  """Î = (I − mean I) / max|I − mean I|, in [−1, 1]; all zeros if all layers are equal."""
  centred = importance.astype(np.float64) - importance.mean(dtype=np.float64)
  largest = np.abs(centred).max()
  # Differences the size of rounding errors say nothing about the layers.
  if largest <= 1e-12 * max(1.0, float(np.abs(importance).max())):
    return np.zeros_like(centred)
  return centred / largest


def advance(sparsity: np.ndarray, rate: np.ndarray, fraction: float = 1.0) -> np.ndarray:
  """s(t) = clip(s(t−1) + fraction · rate, 0, 0.99), with rate = ρ/T − A·Î per layer."""
  return np.clip(sparsity + fraction * rate, 0.0, MAX_SPARSITY)


def _align_up(width: np.ndarray | int, align: int) -> np.ndarray | int:
  return -(-width // align) * align


@dataclasses.dataclass(frozen=True)
class Widths:
  """Kept units of attention (`Budget.removes`) and MLP channels of every layer, int [L]."""

  kv: np.ndarray
  ffn: np.ndarray


class Allocator:
  """Turns sparsities into widths of one model, and stops exactly at a target.

  Costs and targets are in the parts of the budget's unit. If MLP channels cost nothing in it, all are kept.

  Args:
    config: the model that sparsities refer to (the start of the whole schedule).
    align_ffn: MLP widths are multiples of this (a layer's full width is also allowed).
    align_kv: the same for KV heads; query heads may have any number.
    budget: what a target limits, and the unit of attention; None: the number of parameters, and KV groups.
  """

  def __init__(
    self,
    config: ModelConfig,
    align_ffn: int = 1,
    align_kv: int = 1,
    *,
    budget: Budget | None = None,
  ):
    self.config, self.budget = config, budget or budgets.params(config)
    self.unit = self.budget.removes
    units = np.array([self.unit.count(s) for s in config.layers])
    self.align = align_ffn
    self.align_kv = align_kv if self.unit is KV_GROUPS else 1
    if config.traits.joint_qk_norm:  # no unit can be removed
      self.align_kv = int(units.max())
    self.full = Widths(units, np.array([s.ffn for s in config.layers]))

  def cost(self, widths: Widths) -> int:
    """Cost of the model at these widths."""
    return self.budget.cost(widths.kv, widths.ffn)

  def widths(self, sparsity: np.ndarray) -> Widths:
    """keep = floor(width · (1 − s)); removes only whole KV groups; keeps at least one block of each."""
    head_dim = self.config.head_dim
    # Rounding errors of the accumulated s must not remove a channel that the exact sum keeps.
    kept_rows = np.floor(self.full.kv * head_dim * (1 - sparsity) + 1e-9).astype(int)
    kv = self.full.kv - (self.full.kv * head_dim - kept_rows) // head_dim
    ffn = np.floor(self.full.ffn * (1 - sparsity) + 1e-9).astype(int)
    ffn = np.minimum(_align_up(np.maximum(ffn, 1), self.align), self.full.ffn)
    ffn = ffn if self.budget.counts_mlp else self.full.ffn
    return Widths(np.minimum(_align_up(np.maximum(kv, 1), self.align_kv), self.full.kv), ffn)

  def smallest(self) -> int:
    """Cost of the smallest model that the schedule can reach (every s at 0.99)."""
    return self.cost(self.widths(np.full(self.config.num_layers, MAX_SPARSITY)))

  def narrower(self, is_kv: bool, width: int) -> int:
    """The width after removing one more block of KV groups or MLP channels; 0 if none may go."""
    if not is_kv and not self.budget.counts_mlp:
      return 0
    align = self.align_kv if is_kv else self.align
    return int(_align_up(width, align)) - align if width > align else 0

  def _events(self, widths: Widths, sparsity: np.ndarray, rate: np.ndarray) -> Iterator[Removal]:
    """The removals that an increasing sparsity causes, in order; positions are fractions of a step."""
    heap: list[Removal] = []

    def push(layer: int, is_kv: bool, width: int) -> None:
      width = self.narrower(is_kv, width)
      if width < 1:
        return
      # The sparsity beyond which the layer has this width or less.
      unit, full = (self.config.head_dim, self.full.kv) if is_kv else (1, self.full.ffn)
      threshold = 1 - (width * unit + 1) / (full[layer] * unit)
      if rate[layer] > 0:
        fraction = max(0.0, (threshold - sparsity[layer]) / rate[layer])
      else:
        fraction = SPARED * (1 + threshold)
      heapq.heappush(heap, (fraction, layer, is_kv, width))

    for layer in range(self.config.num_layers):
      push(layer, True, int(widths.kv[layer]))
      push(layer, False, int(widths.ffn[layer]))
    while heap:
      event = heapq.heappop(heap)
      yield event
      push(*event[1:])

  def take(
    self, widths: Widths, removals: Iterable[Removal], target: int, limit: float = np.inf
  ) -> tuple[Widths, float]:
    """Removes groups in the given order until the model costs at most `target`.

    A KV group that would overshoot is skipped, so the result is below the target by less than one MLP
    block. Skipped groups are removed only if every MLP is at its last block; the result may then be below by
    up to one group. So it may in a coarse budget, in which no group is skipped.

    Args:
      removals: in ascending order of position; each removes one group or block of a layer and module.
      limit: removals at or beyond this position are not made.

    Returns:
      The widths, and the position reached.
    """
    kv, ffn = widths.kv.copy(), widths.ffn.copy()
    cost, reached, coarse = self.cost(widths), 0.0, self.budget.coarse
    passed_over = []
    for at, layer, is_kv, width in removals:
      if cost <= target:
        break
      if at >= limit:
        reached = limit
        break
      if not is_kv:
        cost -= int(self.budget.layers[layer].mlp[ffn[layer]] - self.budget.layers[layer].mlp[width])
        ffn[layer] = width
      elif width == self.narrower(True, kv[layer]) and (
        coarse or cost - self._lost(kv, layer, width) >= target
      ):
        cost -= self._lost(kv, layer, width)
        kv[layer] = width
      else:
        passed_over.append(layer)
        continue
      if at < SPARED:
        reached = at
    else:  # every MLP is at its last block: only KV groups can be removed
      for layer in passed_over:
        if cost > target and (width := self.narrower(True, kv[layer])):
          cost -= self._lost(kv, layer, width)
          kv[layer] = width
    return Widths(kv, ffn), reached

  def _lost(self, kv: np.ndarray, layer: int, width: int) -> int:
    """Cost of a layer's KV groups beyond `width`."""
    attention = self.budget.layers[layer].attention
    return int(attention[kv[layer]] - attention[width])

  def land(
    self,
    widths: Widths,
    sparsity: np.ndarray,
    rate: np.ndarray,
    target: int,
    limit: float = MAX_LANDING,
  ) -> tuple[Widths, np.ndarray]:
    """Solves the last step: the widths at which the model costs at most `target`.

    Groups are removed in the order of the step (see `take`). If the model is still above the target after
    `limit` steps, the landing stops there, and the next step uses new scores.
    Returns the widths and the sparsities reached.
    """
    landed, fraction = self.take(widths, self._events(widths, sparsity, rate), target, limit)
    # Layers that the rate does not prune may have been narrowed: their s must not fall behind their width.
    # In others it may, and counts as credit.
    reached = np.where(landed.ffn < widths.ffn, self._reached(landed.ffn), 0.0)
    return landed, np.maximum(advance(sparsity, rate, fraction), reached)

  def one_shot(self, widths: Widths, shares: np.ndarray, target: int) -> Widths:
    """Widths that land on `target` in one step from `widths`, with sparsities in proportion to `shares` [L].

    Equal shares prune uniformly; a layer with share 0 is not pruned. Proportions hold to within one group
    or block; a layer that is already narrower is never widened.
    """
    events = self._events(widths, np.zeros_like(shares, np.float64), shares)
    return self.take(widths, (e for e in events if shares[e[1]] > 0), target)[0]

  def removed(self, widths: Widths) -> np.ndarray:
    """Share of every layer's prunable cost that is removed at these widths, float64 [L]."""
    prunable = self.budget.prunable
    return 1 - prunable(widths.kv, widths.ffn) / prunable(self.full.kv, self.full.ffn)

  def _reached(self, ffn: np.ndarray) -> np.ndarray:
    """The sparsities above which layers have these MLP widths."""
    return np.where(ffn < self.full.ffn, 1 - (ffn + 1) / self.full.ffn, 0.0)

  def step(
    self, widths: Widths, sparsity: np.ndarray, rate: np.ndarray, target: int
  ) -> tuple[Widths, np.ndarray]:
    """One pruning step from `widths` and `sparsity`, landing on `target` if it would pass it."""
    if not np.any((rate > 0) & (sparsity < MAX_SPARSITY)):
      # Every layer that the rate would prune is at its limit: prune the others, all at the same rate.
      rate = np.full_like(rate, np.abs(rate).max())
      sparsity = np.maximum(sparsity, self._reached(widths.ffn))
    moved = advance(sparsity, rate)
    wanted = self.widths(moved)
    wanted = Widths(np.minimum(widths.kv, wanted.kv), np.minimum(widths.ffn, wanted.ffn))
    if self.cost(wanted) >= target:
      return wanted, moved
    landed, reached = self.land(widths, sparsity, rate, target)
    if np.array_equal(reached, sparsity) and self.cost(landed) == self.cost(widths):
      return self.land(widths, sparsity, rate, target, limit=np.inf)
    return landed, reached
