"""Adapt-Pruner: Pan et al., arXiv 2502.03460, section 3."""

import numpy as np

from adapt_jax.pruning.methods.base import Method
from adapt_jax.pruning.plan import PruneState, keep_best
from adapt_jax.pruning.scores import Scores
from adapt_jax.pruning.widths import Widths, normalise


class Adapt(Method):
  """Progressive: every step adds ρ/T − A·Î to a layer's sparsity, less if the layer changes its input more.

  Corrects errors of the authors' program (docs/recipes.md): the last step lands on the target, one schedule
  spans all stages, and query heads count for their own KV group.
  """

  def rate(self, scores: Scores) -> np.ndarray:
    """The change of each layer's sparsity in one step, [L]."""
    return 1 / self.options.steps - self.options.amplitude * normalise(scores.distance)

  def step(self, scores: Scores, state: PruneState, target: int) -> PruneState:
    now = Widths(state.plan.kv_widths, state.plan.ffn_widths)
    widths, sparsity = self.allocator.step(now, state.sparsity, self.rate(scores), target)
    plan = keep_best(state.plan, scores.kv, scores.ffn, widths.kv, widths.ffn)
    return PruneState(plan, sparsity, state.step + 1)
