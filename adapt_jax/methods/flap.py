"""FLAP: An et al., arXiv 2312.11983; structure AL-AM of the authors' program, without its biases."""

from collections.abc import Iterator

import numpy as np

from adapt_jax.allocate import Removal, Widths
from adapt_jax.methods.base import OneShot
from adapt_jax.plan import PrunePlan, PruneState
from adapt_jax.scores import Scores


def standardise(values: np.ndarray) -> np.ndarray:
  """(x − mean) / standard deviation (of a sample, n − 1); zeros where all are equal."""
  values = values.astype(np.float64)
  deviation = values.std(ddof=1) if values.size > 1 else 0.0
  return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)


def standardised(scores: Scores, plan: PrunePlan) -> Scores:
  """Scores that can be compared over layers and modules; 0 for what the plan has removed.

  Per layer and module over the columns that are left: of o_proj the squared metric, averaged over a KV
  group's columns after it is standardised; of down_proj the metric itself. So does the authors' program.
  """
  kv, ffn = np.zeros(scores.kv.shape), np.zeros(scores.ffn.shape)
  for layer, (groups, channels) in enumerate(zip(plan.kv, plan.ffn, strict=True)):
    kept = np.flatnonzero(groups)
    columns = scores.o_columns[layer][kept].astype(np.float64)
    kv[layer, kept] = standardise(columns**2).mean((1, 2))
    kept = np.flatnonzero(channels)
    ffn[layer, kept] = standardise(scores.ffn[layer][kept])
  return scores._replace(kv=kv, ffn=ffn)


class Flap(OneShot):
  """WIFV of o_proj and down_proj, standardised and ranked over the whole model, one shot.

  The metric of a column is the variance of its input over the calibration tokens times its squared norm.
  Differs from the authors' program: a plain variance, where theirs weighs deviations from a running mean; a
  KV group with all its query heads where theirs takes heads; every layer keeps a group and an MLP block;
  with prune.align_ffn > 1 blocks of a layer's lowest channels rank by their mean. No bias stands in for
  what went.
  """

  importance = 'fluctuation'

  def step(self, scores: Scores, state: PruneState, target: int) -> PruneState:
    return super().step(standardised(scores, state.plan), state, target)

  def widths(self, scores: Scores, plan: PrunePlan, target: int) -> Widths:
    removals = sorted(self._removals(scores, plan), key=lambda removal: removal[0])
    return self.allocator.take(Widths(plan.kv_widths, plan.ffn_widths), removals, target)[0]

  def _removals(self, scores: Scores, plan: PrunePlan) -> Iterator[Removal]:
    """All that may go, lowest first within a layer and module; the position is the score."""
    for is_kv, masks, values in ((True, plan.kv, scores.kv), (False, plan.ffn, scores.ffn)):
      for layer, mask in enumerate(masks):
        ascending = np.sort(values[layer][np.flatnonzero(mask)])
        widths = [len(ascending)]
        while (width := self.allocator.narrower(is_kv, widths[-1])) > 0:
          widths.append(width)
        gone = len(ascending) - np.array(widths)
        means = np.add.reduceat(ascending, gone)[:-1] / np.diff(gone)
        # Means of equal scores may differ by rounding: the order within the layer has to stand.
        positions = np.maximum.accumulate(means).tolist()
        yield from ((at, layer, is_kv, width) for at, width in zip(positions, widths[1:], strict=True))
