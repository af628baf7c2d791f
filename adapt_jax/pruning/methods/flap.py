"""FLAP: An et al., arXiv 2312.11983; structure AL-AM of the authors' program."""

import numpy as np

from adapt_jax.pruning.methods.base import GlobalOneShot
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scores import Scores


def standardise(values: np.ndarray) -> np.ndarray:
  """(x − mean) / standard deviation (of a sample, n − 1); zeros if all are equal."""
  values = values.astype(np.float64)
  deviation = values.std(ddof=1) if values.size > 1 else 0.0
  return (values - values.mean()) / deviation if deviation > 0 else np.zeros_like(values)


def standardised(scores: Scores, plan: PrunePlan) -> Scores:
  """Scores that are comparable over layers and modules; 0 for groups that the plan has removed.

  Standardised per layer and module over the remaining columns, as in the authors' program: the squared
  metric of o_proj, then averaged over a KV group's columns; the metric itself of down_proj.
  """
  kv, ffn = np.zeros(scores.kv.shape), np.zeros(scores.ffn.shape)
  for layer, (groups, channels) in enumerate(zip(plan.kv, plan.ffn, strict=True)):
    kept = np.flatnonzero(groups)
    columns = scores.o_columns[layer][kept].astype(np.float64)
    kv[layer, kept] = standardise(columns**2).mean((1, 2))
    kept = np.flatnonzero(channels)
    ffn[layer, kept] = standardise(scores.ffn[layer][kept])
  return scores._replace(kv=kv, ffn=ffn)


class Flap(GlobalOneShot):
  """WIFV of o_proj and down_proj, standardised and ranked over the whole model, one shot.

  The metric of a column is the variance of its input over the calibration tokens times its squared norm.
  Differs from the authors' program: a plain variance instead of weighted deviations from a running mean; KV
  groups with all their query heads, or an equal number of heads in each (prune.attention), instead of single
  heads; every layer keeps a group and an MLP block. The biases that replace removed columns are
  prune.compensate = 'bias', available for any method.
  """

  importance = 'fluctuation'

  def comparable(self, scores: Scores, plan: PrunePlan) -> Scores:
    return standardised(scores, plan)
