"""The interface of pruning methods: from the scores of one pass to the groups that are kept.

The pruner draws calibration rows, computes scores, asks the method for a step, sets the removed groups to
zero, and repeats until the target is reached. NumPy only.
"""

import abc
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from adapt_jax.config.declare import MAX_SPARSITY
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.models.config import ModelConfig
from adapt_jax.pruning.budget import Budget
from adapt_jax.pruning.plan import PrunePlan, PruneState, keep_best
from adapt_jax.pruning.scores import Scores
from adapt_jax.pruning.widths import Allocator, Removal, Widths


class Method(abc.ABC):
  """Decides what each pruning step removes.

  Args:
    config: the model that widths and sparsities refer to: the dense one, or the one a stage starts from.
    options: `config.prune`.
    budget: what targets limit, of a model with these layers; None: the number of parameters. Costs and
      targets are in the parts of its unit.
  """

  # The scores of groups (an Importance or a name in criteria.IMPORTANCES) and of layers (a name in
  # DISTANCES); '': those of config.prune.
  importance: ClassVar[Any] = ''
  distance: ClassVar[str] = ''
  # Whether every step prunes the next layer of the model, all on the calibration rows of the first step.
  layer_by_layer: ClassVar[bool] = False
  # Whether it removes whole layers, and nothing else.
  whole_layers: ClassVar[bool] = False

  def __init__(self, config: ModelConfig, options: PruneOptions, budget: Budget | None = None):
    self.config, self.options = config, options
    kv, ffn, _ = options.multiples
    self.allocator = Allocator(config, ffn, kv, budget=budget)

  @property
  def budget(self) -> Budget:
    """What targets limit."""
    return self.allocator.budget

  def smallest(self) -> int:
    """The lowest target that can always be reached."""
    return self.allocator.smallest()

  def layer_cost(self, scores: Scores, plan: PrunePlan) -> list[float]:
    """For the report, what a layer's groups cost, [L], if the method ranks those of all layers together."""
    return []

  @abc.abstractmethod
  def step(self, scores: Scores, state: PruneState, target: int) -> PruneState:
    """The state after one more step; it may still cost more than `target`.

    Every step must change the plan or the sparsity: a run whose method does neither is stopped with an error
    (with `layer_by_layer`, after as many such steps as the model has layers).

    Args:
      scores: scores of the model at `state.plan`, on the host; padded to the widest layer.
      state: the groups kept so far, in the numbering of the dense model.
      target: the highest cost allowed.
    """


class OneShot(Method):
  """Reaches the target in one step: keeps the groups with the highest scores, as many as `widths` says."""

  @abc.abstractmethod
  def widths(self, scores: Scores, plan: PrunePlan, target: int) -> Widths:
    """The widths that land on `target`, as closely as `Allocator.take` does."""

  def step(self, scores: Scores, state: PruneState, target: int) -> PruneState:
    widths = self.widths(scores, state.plan, target)
    plan = keep_best(state.plan, scores.kv, scores.ffn, widths.kv, widths.ffn)
    return PruneState(plan, self.allocator.removed(widths), state.step + 1)


class UniformOneShot(OneShot):
  """One-shot, with equal sparsity in all layers that `touched` selects, to within one group or block."""

  def touched(self) -> np.ndarray:
    """The layers that may be pruned, bool [L]."""
    return np.ones(self.config.num_layers, bool)

  def smallest(self) -> int:
    return self.allocator.cost(self.allocator.widths(MAX_SPARSITY * self.touched()))

  def widths(self, scores: Scores, plan: PrunePlan, target: int) -> Widths:
    now = Widths(plan.kv_widths, plan.ffn_widths)
    return self.allocator.one_shot(now, self.touched().astype(np.float64), target)


class GlobalOneShot(OneShot):
  """One-shot, with one ranking of the groups and channels of all layers: removes the lowest.

  With prune.align_ffn > 1, blocks of a layer's lowest channels are ranked by their mean.
  """

  @abc.abstractmethod
  def comparable(self, scores: Scores, plan: PrunePlan) -> Scores:
    """`scores` with kv [L, K] and ffn [L, F] on a common scale for all layers and modules."""

  def layer_cost(self, scores: Scores, plan: PrunePlan) -> list[float]:
    """The median of what is ranked, over the groups and channels that a layer has at `plan`."""
    ranked = self.comparable(scores, plan)
    values = [kv[np.flatnonzero(kept)] for kv, kept in zip(ranked.kv, plan.kv, strict=True)]
    if self.budget.counts_mlp:
      channels = [ffn[np.flatnonzero(kept)] for ffn, kept in zip(ranked.ffn, plan.ffn, strict=True)]
      values = [np.concatenate(of_layer) for of_layer in zip(values, channels, strict=True)]
    return [float(np.median(of_layer)) for of_layer in values]

  def step(self, scores: Scores, state: PruneState, target: int) -> PruneState:
    return super().step(self.comparable(scores, state.plan), state, target)

  def widths(self, scores: Scores, plan: PrunePlan, target: int) -> Widths:
    removals = sorted(self._removals(scores, plan), key=lambda removal: removal[0])
    return self.allocator.take(Widths(plan.kv_widths, plan.ffn_widths), removals, target)[0]

  def _removals(self, scores: Scores, plan: PrunePlan) -> Iterator[Removal]:
    """All possible removals, lowest first within a layer and module; the position is the score."""
    for is_kv, masks, values in ((True, plan.kv, scores.kv), (False, plan.ffn, scores.ffn)):
      for layer, mask in enumerate(masks):
        ascending = np.sort(values[layer][np.flatnonzero(mask)])
        widths = [len(ascending)]
        while (width := self.allocator.narrower(is_kv, widths[-1])) > 0:
          widths.append(width)
        gone = len(ascending) - np.array(widths)
        means = np.add.reduceat(ascending, gone)[:-1] / np.diff(gone)
        # Means of equal scores may differ by rounding: the order within the layer must not change.
        positions = np.maximum.accumulate(means).tolist()
        yield from ((at, layer, is_kv, width) for at, width in zip(positions, widths[1:], strict=True))
