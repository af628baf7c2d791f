"""Structured Wanda: Sun et al., arXiv 2306.11695, as the baseline Wanda-sp of FLAP, arXiv 2312.11983."""

import numpy as np

from adapt_jax.pruning.methods.base import OneShot
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scores import Scores
from adapt_jax.pruning.widths import Widths


class WandaSp(OneShot):
  """|w| · norm of the input, summed over a group's columns of o_proj or down_proj; uniform.

  As in the authors' program, every layer is scored on the outputs of the pruned layers before it. Differs
  from it in that a KV group has the columns of all its query heads, and a query head (prune.attention) those
  of one head in each KV group.
  """

  importance = 'wanda'
  layer_by_layer = True

  def widths(self, scores: Scores, plan: PrunePlan, target: int) -> Widths:
    """The final widths for the first layer that is still wider, the present ones for all others.

    The final widths are those of one shot from the dense model, so they are the same in all steps of a stage.
    Where the targets of two stages differ by less than a KV group, the second may be missed by that much.
    """
    now, shares = Widths(plan.kv_widths, plan.ffn_widths), np.ones(self.config.num_layers)
    final = self.allocator.one_shot(self.allocator.full, shares, target)
    layer = np.flatnonzero((final.kv < now.kv) | (final.ffn < now.ffn))[0]
    now.kv[layer] = min(final.kv[layer], now.kv[layer])
    now.ffn[layer] = min(final.ffn[layer], now.ffn[layer])
    return now
