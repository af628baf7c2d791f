"""Structured Wanda: Sun et al., arXiv 2306.11695, as the baseline Wanda-sp of FLAP, arXiv 2312.11983."""

from adapt_jax.pruning.methods.base import UniformOneShot


class WandaSp(UniformOneShot):
  """|w| · norm of the input, summed over a group's columns of o_proj or down_proj; uniform, one shot.

  Differs from FLAP's program, which scores a layer on the outputs of the layers already pruned: here one
  pass over the dense model scores all layers, and a KV group has the columns of all its query heads.
  """

  importance = 'wanda'
