"""LLM-Pruner: Ma et al., arXiv 2305.11627."""

import numpy as np

from adapt_jax.config.declare import MAX_SPARSITY
from adapt_jax.config.options import PruneOptions
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.pruning.methods.base import UniformOneShot

# Decoder layers at either end that are never touched, as in the paper's runs on LLaMA-7B.
FIRST, LAST = 4, 2


class LlmPruner(UniformOneShot):
  """Taylor scores, one shot, uniform over the layers between the first four and the last two.

  Differs from the authors' program: KV groups and channels always (its `block` mode), Σ |w·g| over all
  members of a group (its `param_first` with `sum`), and the ratio of the middle layers follows from the
  target of the whole model. Without its LoRA recovery.

  Raises InputError if the model has no layer between.
  """

  importance = 'taylor'

  def __init__(self, config: ModelConfig, options: PruneOptions):
    super().__init__(config, options)
    if config.num_layers <= FIRST + LAST:
      raise InputError(
        f"config.prune.method = 'llm_pruner' leaves the first {FIRST} and last {LAST} layers alone, and "
        f'config.model.source has only {config.num_layers}: use another method'
      )

  def touched(self) -> np.ndarray:
    layers = np.arange(self.config.num_layers)
    return (layers >= FIRST) & (layers < len(layers) - LAST)

  def smallest(self) -> int:
    return self.allocator.params(self.allocator.widths(MAX_SPARSITY * self.touched()))
