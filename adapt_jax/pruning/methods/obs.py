"""Optimal Brain Surgeon over the whole model: Hassibi and Stork, NIPS 1992."""

from adapt_jax.pruning.methods.base import GlobalOneShot
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scores import Scores


class Obs(GlobalOneShot):
  """What costs the loss least per parameter goes, over all layers and modules, one shot.

  The cost of a KV group or channel is that of `adapt_jax.pruning.curvature`: second order, with what stays
  corrected for what goes, as in the LLM Surgeon (van der Ouderaa et al., arXiv 2312.17244). It differs:
  whole KV groups and channels where it takes rows and columns of every matrix, one shot where it takes many,
  and the correction itself is left to prune.compensate, whose least squares see the pruned layers before.
  """

  importance = 'curvature'

  def comparable(self, scores: Scores, plan: PrunePlan) -> Scores:
    costs = self.allocator.kv_cost[:, None], self.allocator.ffn_cost
    return scores._replace(kv=scores.kv / costs[0], ffn=scores.ffn / costs[1])
