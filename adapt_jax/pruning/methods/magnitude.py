"""Magnitude pruning: the oldest baseline, as LLM-Pruner's `l2`, arXiv 2305.11627."""

from adapt_jax.pruning.methods.llm_pruner import LlmPruner


class Magnitude(LlmPruner):
  """The L2 norm of all weights of a group; the layers at either end stay whole, as for `LlmPruner`.

  The baseline in FLAP's program uses only the columns of o_proj and down_proj, and prunes all layers.
  """

  importance = 'l2'  # the squared norm: the same order
