"""LLM-Pruner: Ma et al., arXiv 2305.11627."""

import numpy as np

from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.pruning.budget import Budget
from adapt_jax.pruning.methods.base import UniformOneShot

# Decoder layers at either end that are never pruned, as in the paper's runs on LLaMA-7B.
FIRST, LAST = 4, 2


class LlmPruner(UniformOneShot):
  """Taylor scores, one shot, uniform over the layers between the first four and the last two.

  Of the authors' program it has the `block` mode (KV groups and channels) with Σ |w·g| over all members of
  a group (`param_first` with `sum`), without LoRA recovery. Unlike there, the ratio of the middle layers
  follows from the target of the whole model.

  Raises InputError if the model has no layers in between.
  """

  importance = 'taylor'

  def __init__(self, config: ModelConfig, options: PruneOptions, budget: Budget | None = None):
    super().__init__(config, options, budget)
    if config.num_layers <= FIRST + LAST:
      raise InputError(
        f'prune.method = {options.method!r} leaves the first {FIRST} and last {LAST} layers alone, '
        f'and model.source has only {config.num_layers}: use another method'
      )

  def touched(self) -> np.ndarray:
    layers = np.arange(self.config.num_layers)
    return (layers >= FIRST) & (layers < len(layers) - LAST)
