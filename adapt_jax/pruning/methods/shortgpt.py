"""ShortGPT: Men et al., arXiv 2403.03853."""

import numpy as np

from adapt_jax.pruning.methods.base import Method
from adapt_jax.pruning.plan import PruneState
from adapt_jax.pruning.scores import Scores


class ShortGpt(Method):
  """Removes the decoder layers with the lowest block influence, in one shot.

  Block influence is 1 − cos(input, output) of a layer, averaged over the calibration tokens. Layers are
  removed, lowest first, while the model is above the target, so it ends below the target by up to a layer,
  never above it. The paper sets the number of layers; here the target does. One layer is always kept.
  """

  importance = 'l2'  # not used; needs no gradient
  distance = 'cosine'
  whole_layers = True

  def smallest(self) -> int:
    return self.budget.fixed + max(c.rest + int(c.attention[-1] + c.mlp[-1]) for c in self.budget.layers)

  def step(self, scores: Scores, state: PruneState, target: int) -> PruneState:
    influence = 1 + scores.distance
    plan = state.plan
    for layer in np.argsort(influence, kind='stable'):
      if plan.cost(self.budget) <= target:
        break
      if plan.present[layer]:
        plan = plan.without_layer(layer)
    return PruneState(plan, (~plan.present).astype(np.float64), state.step + 1)
