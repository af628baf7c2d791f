"""Optimal Brain Surgeon over the whole model: Hassibi and Stork, NIPS 1992."""

from collections.abc import Iterator

from adapt_jax.pruning.methods.base import GlobalOneShot
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scores import Scores
from adapt_jax.pruning.widths import SPARED, Removal


class Obs(GlobalOneShot):
  """Removes what increases the loss least per unit of the budget, over all layers and modules, in one shot.

  The cost of a channel, KV group or query head (prune.attention) is that of `adapt_jax.pruning.curvature`:
  second order, with the remaining weights corrected for the removed ones, as in the LLM Surgeon (van der
  Ouderaa et al., arXiv 2312.17244).
  Differences: whole KV groups and channels instead of rows and columns of every matrix, one shot instead of
  many, and prune.compensate does the correction; its least squares account for the pruned earlier layers.
  The first layer's attention is pruned last: its removal can break a model's attention sink, which its costs
  did not show (docs/notes/experiments.md, "Several stages").
  """

  importance = 'curvature'

  def comparable(self, scores: Scores, plan: PrunePlan) -> Scores:
    # Channels are ranked in the precision of their scores.
    channel = self.budget.mean_costs('mlp')[:, None].astype(scores.ffn.dtype)
    group = self.budget.mean_costs('attention')[:, None]
    return scores._replace(kv=scores.kv / group, ffn=scores.ffn / channel)

  def _removals(self, scores: Scores, plan: PrunePlan) -> Iterator[Removal]:
    for at, layer, is_kv, width in super()._removals(scores, plan):
      yield (SPARED if is_kv and layer == 0 else at), layer, is_kv, width
