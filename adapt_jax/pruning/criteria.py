"""Scores of weight groups and layers: the importances and distances that `config.prune` names."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from adapt_jax.models.network.llama import Params
from adapt_jax.pruning.attention_units import AttentionUnit
from adapt_jax.pruning.surgery import group_axes


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """−cos(x, y) over the last axis: −1 if a layer keeps its input's direction."""
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return -jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-8)


DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  'cosine': cosine,
  'euclidean': lambda x, y: jnp.linalg.norm(x - y, axis=-1),
  'manhattan': lambda x, y: jnp.abs(x - y).sum(axis=-1),
}


@dataclasses.dataclass(frozen=True)
class Importance:
  """Defines the score of a weight w with gradient g and Fisher estimate F; a group's score is Σ |score|.

  With `columns`, it scores columns of o_proj and down_proj; a group's score is the sum over its columns.

  score: (w, g, F) -> the weight's signed score, elementwise in fp32.
  gradient: whether g is needed; if not, scoring is a forward pass.
  fisher: whether F is needed, the mean over samples of the squared gradient of the sample's loss.
  per_row: sum the scores of a row (a column of o and down) before taking the absolute value.
  columns: (weight [D, …], mean and variance […] of its inputs over the calibration tokens) -> […].
  curvature: score a group instead by its removal cost, from the loss's curvature (`pruning.curvature`).
  """

  score: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = lambda w, g, f: w
  gradient: bool = True
  fisher: bool = False
  per_row: bool = False
  columns: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
  curvature: bool = False


def _fluctuation(w: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
  return variance * jnp.square(w).sum(0)


def _wanda(w: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
  return jnp.abs(w).sum(0) * jnp.sqrt(variance + jnp.square(mean))


# Paper section 3.2, and the first-order form of Molchanov et al., arXiv 1906.10771; names as in LLM-Pruner.
# `random`: the pruner draws these scores; the entry here is only used for the layers' distances.
# `fluctuation`: variance of the column's input · squared norm of the column (WIFV of An et al., arXiv
# 2312.11983). `wanda`: Σ |w| · root mean square of the input (Sun et al., arXiv 2306.11695, summed as there).
# `curvature`: see `adapt_jax.pruning.curvature`.
IMPORTANCES: dict[str, Importance] = {
  'taylor': Importance(lambda w, g, f: w * g),
  'taylor_vectorize': Importance(lambda w, g, f: w * g, per_row=True),
  'taylor_second': Importance(lambda w, g, f: w * w * f, fisher=True),
  'taylor_mix': Importance(lambda w, g, f: w * g - 0.5 * w * w * f, fisher=True),
  'l1': Importance(lambda w, g, f: w, gradient=False),
  'l2': Importance(lambda w, g, f: w * w, gradient=False),
  'fluctuation': Importance(gradient=False, columns=_fluctuation),
  'wanda': Importance(gradient=False, columns=_wanda),
  'curvature': Importance(curvature=True),
  'random': Importance(lambda w, g, f: w, gradient=False),
}


def find_importance(importance: str | Importance) -> Importance:
  """Looks up an importance by name; returns an `Importance` unchanged."""
  return IMPORTANCES[importance] if isinstance(importance, str) else importance


def group_scores(
  layer: Params,
  gradient: Params,
  fisher: Params,
  importance: Importance,
  unit: AttentionUnit,
) -> list[jax.Array]:
  """[scores [K] of the KV groups, scores [F] of the channels]: sums over all member weights, in fp32.

  With query heads as `unit`, the first are theirs, [G].
  """
  totals = []
  for block, axes in group_axes(unit).items():
    total = jnp.zeros(())
    for name, axis in axes.items():
      if name not in layer[block]:
        continue
      weight = layer[block][name].astype(jnp.float32)
      score = importance.score(weight, gradient[block][name], fisher[block][name])
      if importance.per_row and not name.endswith('bias'):
        hidden = 0 if name in ('o', 'down') else score.ndim - 1
        score = score.sum(hidden, keepdims=True)
      score = jnp.abs(score)
      total += score.sum([a for a in range(score.ndim) if a != axis])
    totals.append(total)
  return totals
