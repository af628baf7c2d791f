"""Scores of all groups and distances of all layers in one forward and one backward pass.

Scoring runs on parameters stacked over layers at their original widths (`surgery.stack`), pruned
groups being zeros, so one program serves every step and stage of a run. The backward pass is a
reverse scan over layers: each layer's gradient is reduced to group scores and dropped, so that the
peak is the weights, the layers' inputs on the calibration batch and one layer's gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adapt_jax.loss import next_token_loss
from adapt_jax.surgery import GROUP_AXES
from models import llama
from models.config import LayerShape, ModelConfig
from models.errors import InputError
from models.layers import rms_norm
from models.llama import Params


class Scores(NamedTuple):
  """What one pass tells.

  kv [L, K] and ffn [L, F]: importance of every group. distance [L]: mean over tokens of the layer's
  distance between input and output, larger = more change. loss: mean next-token cross-entropy, nats.
  """

  kv: jax.Array
  ffn: jax.Array
  distance: jax.Array
  loss: jax.Array


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
  """−cos(x, y) over the last axis: −1 where a layer keeps its input's direction."""
  norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
  return -jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-8)


def euclidean(x: jax.Array, y: jax.Array) -> jax.Array:
  """‖x − y‖₂ over the last axis."""
  return jnp.linalg.norm(x - y, axis=-1)


def manhattan(x: jax.Array, y: jax.Array) -> jax.Array:
  """‖x − y‖₁ over the last axis."""
  return jnp.abs(x - y).sum(axis=-1)


DISTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  'cosine': cosine,
  'euclidean': euclidean,
  'manhattan': manhattan,
}


@dataclasses.dataclass(frozen=True)
class Importance:
  """How a weight w with gradient g and Fisher estimate F is scored; a group's score is Σ |score|.

  score: (w, g, F) -> the weight's score, signed, elementwise in fp32.
  gradient: whether it asks for g at all; without, scoring is a forward pass.
  fisher: whether it asks for F = mean over samples of the squared gradient of the sample's loss.
  per_row: add the weights of a row (a column of o and down) before the absolute value is taken.
  """

  score: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  gradient: bool = True
  fisher: bool = False
  per_row: bool = False


# Paper section 3.2, and the first-order form of Molchanov et al., arXiv 1906.10771; names as in LLM-Pruner.
# `random` is drawn by the pruner: its entry here only serves the layers' distances.
IMPORTANCES: dict[str, Importance] = {
  'taylor': Importance(lambda w, g, f: w * g),
  'taylor_vectorize': Importance(lambda w, g, f: w * g, per_row=True),
  'taylor_second': Importance(lambda w, g, f: w * w * f, fisher=True),
  'taylor_mix': Importance(lambda w, g, f: w * g - 0.5 * w * w * f, fisher=True),
  'l1': Importance(lambda w, g, f: w, gradient=False),
  'l2': Importance(lambda w, g, f: w * w, gradient=False),
  'random': Importance(lambda w, g, f: w, gradient=False),
}


def group_scores(
  layer: Params, gradient: Params, fisher: Params, importance: Importance, *, reference_fold: bool = False
) -> list[jax.Array]:
  """[scores [K] of the KV groups, scores [F] of the channels]: sums over all member weights, in fp32.

  `reference_fold` credits query head h to group h mod K, as the authors' program does, not to h // G.
  """
  totals = []
  for block, axes in GROUP_AXES.items():
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
      if reference_fold and name in ('q', 'q_bias', 'o'):
        heads = score.sum([a for a in range(score.ndim) if a not in (axis, axis + 1)])  # [K, G]
        total += heads.reshape(heads.shape[::-1]).sum(0)
      else:
        total += score.sum([a for a in range(score.ndim) if a != axis])
    totals.append(total)
  return totals


@dataclasses.dataclass(frozen=True)
class Scorer:
  """The scoring program: `scorer(stacked, tokens)` on parameters from `surgery.stack`.

  Args:
    config: the model at its original widths; all layers need the same number of query heads per KV head.
    micro_batch: rows that go through a layer at once; divides the number of calibration rows.
    dtype: of weights and activations; gradients are summed and scored in fp32.
    reference_fold: see `group_scores`.
  """

  config: ModelConfig
  importance: str = 'taylor'
  distance: str = 'cosine'
  micro_batch: int = 8
  dtype: Any = jnp.float32
  reference_fold: bool = False

  @property
  def shape(self) -> LayerShape:
    """The widest layer's shape, to which all are padded."""
    sizes = {s.group_size for s in self.config.layers}
    if len(sizes) > 1:
      raise InputError(
        f'model.source has layers with different query heads per KV head ({sorted(sizes)}): such a '
        f'model cannot be pruned again'
      )
    kv = max(s.num_kv_heads for s in self.config.layers)
    return LayerShape(kv * sizes.pop(), kv, max(s.ffn for s in self.config.layers))

  def __call__(self, stacked: Params, tokens_ST: jax.Array) -> Scores:
    """Scores of S rows of T tokens. The gradient is that of the mean loss over the whole batch."""
    S, T = tokens_ST.shape
    tokens_MBT = tokens_ST.reshape(-1, self.micro_batch, T)
    tables, shape = llama.rope(self.config, T), self.shape
    measure = DISTANCES[self.distance]

    def run(layer: Params, x_BTD: jax.Array) -> jax.Array:
      return llama.apply_layer(self.config, shape, layer, x_BTD, tables)

    def forward(x_MBTD: jax.Array, layer: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
      def micro(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_BTD = run(layer, x_BTD)
        return y_BTD, measure(x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)).sum()

      y_MBTD, distance_M = jax.lax.map(micro, x_MBTD)
      return y_MBTD, (x_MBTD, distance_M.sum() / (S * T))

    x_MBTD = stacked['embed'][tokens_MBT].astype(self.dtype)
    x_MBTD, (inputs_LMBTD, distance_L) = jax.lax.scan(forward, x_MBTD, stacked['layers'])

    def head_loss(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      x_BTD, tokens_BT = xs

      def loss(x: jax.Array) -> jax.Array:
        x = rms_norm(x, stacked['norm'], self.config.rms_norm_eps)
        return next_token_loss(x, llama.head(stacked), tokens_BT) / (S * (T - 1))

      return jax.value_and_grad(loss)(x_BTD)

    losses_M, gradient_MBTD = jax.lax.map(head_loss, (x_MBTD, tokens_MBT))
    kv, ffn = self._group_scores(run, stacked['layers'], inputs_LMBTD, gradient_MBTD)
    return Scores(kv, ffn, distance_L, losses_M.sum())

  def _group_scores(
    self, run: Callable[..., jax.Array], layers: Params, inputs_LMBTD: jax.Array, gradient_MBTD: jax.Array
  ) -> list[jax.Array]:
    """[kv [L, K], ffn [L, F]]; `gradient_MBTD` is ∂L/∂x of the last layer's output."""
    importance, samples = IMPORTANCES[self.importance], gradient_MBTD.shape[0] * self.micro_batch

    def score(layer: Params, gradient: Params, fisher: Params) -> list[jax.Array]:
      return group_scores(layer, gradient, fisher, importance, reference_fold=self.reference_fold)

    if not importance.gradient:
      return jax.lax.scan(lambda _, layer: (None, score(layer, layer, layer)), None, layers)[1]

    def pull(layer: Params, x_BTD: jax.Array, g_BTD: jax.Array) -> tuple[Params, Params, jax.Array]:
      if not importance.fisher:
        layer_gradient, x_gradient = jax.vjp(run, layer, x_BTD)[1](g_BTD)
        return _to_fp32(layer_gradient), {}, x_gradient

      def one(x_TD: jax.Array, g_TD: jax.Array) -> tuple[Params, jax.Array]:
        layer_gradient, x_gradient = jax.vjp(run, layer, x_TD[None])[1](g_TD[None])
        return _to_fp32(layer_gradient), x_gradient[0]

      each, x_gradient = jax.vmap(one)(x_BTD, g_BTD)
      total = jax.tree.map(lambda g: g.sum(0), each)
      # L is a mean over samples: a sample's own gradient is `samples` times its part of L's.
      fisher = jax.tree.map(lambda g: samples * jnp.square(g).sum(0), each)
      return total, fisher, x_gradient

    def backward(g_MBTD: jax.Array, xs: tuple[Params, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
      layer, x_MBTD = xs

      def micro(sums: tuple[Params, Params], xg: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        gradient, fisher, x_gradient = pull(layer, *xg)
        return jax.tree.map(jnp.add, sums, (gradient, fisher)), x_gradient

      zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), layer)
      start = (zeros, zeros if importance.fisher else {})
      (gradient, fisher), g_MBTD = jax.lax.scan(micro, start, (x_MBTD, g_MBTD))
      return g_MBTD, score(layer, gradient, fisher or gradient)

    return jax.lax.scan(backward, gradient_MBTD, (layers, inputs_LMBTD), reverse=True)[1]


def _to_fp32(tree: Params) -> Params:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
