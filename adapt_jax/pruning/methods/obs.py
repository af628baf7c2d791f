"""Optimal Brain Surgeon over the whole model: Hassibi and Stork, NIPS 1992."""

import numpy as np

from adapt_jax.pruning.methods.base import GlobalOneShot
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scores import Scores

# Log of the last layer's cost over the first's, of equal curvature (docs/results.md has what others gave).
TILT = 0.8


class Obs(GlobalOneShot):
  """What costs the loss least per parameter goes, over all layers and modules, one shot.

  The cost of a KV group or channel is that of `adapt_jax.pruning.curvature`: second order, with what stays
  corrected for what goes, as in the LLM Surgeon (van der Ouderaa et al., arXiv 2312.17244). It differs:
  whole KV groups and channels where it takes rows and columns of every matrix, one shot where it takes many,
  and the correction itself is left to prune.compensate, whose least squares see the pruned layers before.
  Those pull the residual stream back to where it was, so what early layers lose costs less than curvature,
  which knows nothing of the layers after, says: with least squares costs count from exp(−TILT/2) times in
  the first layer to exp(TILT/2) times in the last.
  """

  importance = 'curvature'

  def comparable(self, scores: Scores, plan: PrunePlan) -> Scores:
    depth = np.linspace(-0.5, 0.5, self.config.num_layers)[:, None]
    tilt = np.exp(TILT * depth) if self.options.compensate == 'least_squares' else np.ones_like(depth)
    sizes = self.allocator.kv_cost[:, None], self.allocator.ffn_cost
    return scores._replace(kv=tilt * scores.kv / sizes[0], ffn=tilt * scores.ffn / sizes[1])
