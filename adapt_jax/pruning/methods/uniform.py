"""Adapt-Pruner without layer importance: its ablation, and the reference's mode of the same name."""

import numpy as np

from adapt_jax.pruning.methods.adapt import Adapt
from adapt_jax.pruning.scores import Scores


class Uniform(Adapt):
  """The same progressive schedule, with ρ/T for every layer."""

  def rate(self, scores: Scores) -> np.ndarray:
    return np.full(self.config.num_layers, 1 / self.options.steps)
