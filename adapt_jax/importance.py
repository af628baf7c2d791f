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


def taylor(weight: jax.Array, gradient: jax.Array) -> jax.Array:
  """|w · ∂L/∂w| of every weight (Molchanov et al., arXiv 1906.10771; paper section 3.2, `param_first`)."""
  return jnp.abs(weight * gradient)


IMPORTANCES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {'taylor': taylor}


def group_scores(layer: Params, gradient: Params, weight_score: Callable[..., jax.Array]) -> list[jax.Array]:
  """[scores [K] of the KV groups, scores [F] of the channels]: sums over all member weights, in fp32."""
  totals = []
  for block, axes in GROUP_AXES.items():
    total = jnp.zeros(())
    for name, axis in axes.items():
      if name in layer[block]:
        score = weight_score(layer[block][name].astype(jnp.float32), gradient[block][name])
        total += score.sum(axis=[a for a in range(score.ndim) if a != axis])
    totals.append(total)
  return totals


@dataclasses.dataclass(frozen=True)
class Scorer:
  """The scoring program: `scorer(stacked, tokens)` on parameters from `surgery.stack`.

  Args:
    config: the model at its original widths; all layers need the same number of query heads per KV head.
    micro_batch: rows that go through a layer at once; divides the number of calibration rows.
    dtype: of weights and activations; gradients are summed and scored in fp32.
  """

  config: ModelConfig
  importance: str = 'taylor'
  distance: str = 'cosine'
  micro_batch: int = 8
  dtype: Any = jnp.float32

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

    def backward(g_MBTD: jax.Array, xs: tuple[Params, jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
      layer, x_MBTD = xs

      def micro(total: Params, xg: tuple[jax.Array, jax.Array]) -> tuple[Params, jax.Array]:
        _, pullback = jax.vjp(run, layer, xg[0])
        layer_gradient, x_gradient = pullback(xg[1])
        return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, layer_gradient), x_gradient

      zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), layer)
      total, g_MBTD = jax.lax.scan(micro, zeros, (x_MBTD, g_MBTD))
      return g_MBTD, group_scores(layer, total, IMPORTANCES[self.importance])

    _, (kv, ffn) = jax.lax.scan(backward, gradient_MBTD, (stacked['layers'], inputs_LMBTD), reverse=True)
    return Scores(kv, ffn, distance_L, losses_M.sum())
