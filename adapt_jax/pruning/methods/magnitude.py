"""Magnitude pruning: the oldest baseline."""

from adapt_jax.pruning.methods.base import UniformOneShot


class Magnitude(UniformOneShot):
  """The L2 norm of all weights of a group, uniform over the layers, one shot.

  The baseline in FLAP's program uses only the columns of o_proj and down_proj; here the whole group counts,
  as in LLM-Pruner's `l2`.
  """

  importance = 'l2'  # the squared norm: the same order
