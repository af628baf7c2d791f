"""Scores of all groups and distances of all layers in one forward and one backward pass.

Scoring uses parameters stacked over layers at their original widths (`surgery.stack`), with pruned
groups set to zero, so all steps and stages of a run share one program. The backward pass is a reverse
scan over layers: each layer's gradient is reduced to group scores and discarded, so peak memory is the
weights, the layers' inputs on the calibration batch and one layer's gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.positions import Positions, PositionTables
from adapt_jax.models.network.sharding import constrain, constrain_params, gathered, row_shards
from adapt_jax.pruning import algebra, curvature
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS, AttentionUnit
from adapt_jax.pruning.criteria import DISTANCES, Importance, find_importance, group_scores
from adapt_jax.pruning.scores import Scores
from adapt_jax.training.loss import (
  ChunkLoss,
  capped,
  cross_entropy,
  fisher_cross_entropy,
  shift,
  sum_over_chunks,
  whole,
)

# Mean and variance over tokens of the inputs of o_proj and down_proj, by column: {'o': …, 'down': …}.
Moments = dict[str, tuple[jax.Array, jax.Array]]


def micro_batches(tokens_ST: jax.Array, rows: int) -> jax.Array:
  """The tokens in parts of so many rows, [M, B, T]."""
  return constrain(tokens_ST.reshape(-1, rows, tokens_ST.shape[1]), '.B.')


def embedded(config: ModelConfig, params: Params, tokens_MBT: jax.Array, dtype: Any) -> jax.Array:
  """The stream before the first layer, [M, B, T, D]."""
  return jax.lax.map(lambda tokens_BT: llama.embed(config, params, tokens_BT, dtype), tokens_MBT)


def _moments(x_TC: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and variance of every column, in fp32; in two passes, since E[x²] − E[x]² loses precision."""
  x_TC = x_TC.astype(jnp.float32)
  mean_C = x_TC.mean(0)
  return mean_C, jnp.square(x_TC - mean_C).mean(0)


def _merge(mean_MC: jax.Array, variance_MC: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Combines the moments of equally large parts into those of all tokens."""
  return mean_MC.mean(0), variance_MC.mean(0) + mean_MC.var(0)


@dataclasses.dataclass(frozen=True)
class Scorer:
  """The scoring program: `scorer(stacked, tokens)` on parameters from `surgery.stack`.

  Args:
    config: the model at its original widths; all layers need as many query heads per KV head or, with query
      heads as `unit`, as many KV heads.
    micro_batch: rows that a layer processes at once; must divide the number of calibration rows.
    importance: a name in `criteria.IMPORTANCES`, or an `Importance`.
    dtype: dtype of weights and activations; gradients are summed and scored in fp32.
    unit: what is removed from attention.
  """

  config: ModelConfig
  importance: str | Importance = 'taylor'
  distance: str = 'cosine'
  micro_batch: int = 8
  dtype: Any = jnp.float32
  unit: AttentionUnit = KV_GROUPS

  @property
  def shape(self) -> LayerShape:
    """The shape to which all layers are padded: the largest widths of any layer."""
    layers, by_head = self.config.layers, self.unit is QUERY_HEADS
    sizes = {s.num_kv_heads for s in layers}, {s.group_size for s in layers}
    fixed, others = sizes if by_head else sizes[::-1]
    if len(fixed) > 1:
      what = 'KV heads' if by_head else 'query heads per KV head'
      unit = KV_GROUPS if by_head else QUERY_HEADS
      remedy = 'cannot be pruned again'
      if len(others) == 1:
        remedy = f'can only be pruned with prune.attention = {unit.name!r}'
      raise InputError(
        f'model.source has layers with different numbers of {what} ({sorted(fixed)}): such a model {remedy}'
      )
    kv, group = max(s.num_kv_heads for s in layers), max(s.group_size for s in layers)
    return LayerShape(kv * group, kv, max(s.ffn for s in layers))

  @property
  def _indices(self) -> jax.Array:
    return jnp.arange(self.config.num_layers)

  def __call__(self, stacked: Params, tokens_ST: jax.Array) -> Scores:
    """Scores of S rows of T tokens. The gradient is that of the mean loss over the whole batch."""
    S, T = tokens_ST.shape
    tokens_MBT = micro_batches(tokens_ST, self.micro_batch)
    tables = llama.rope(self.config, T)
    if find_importance(self.importance).curvature:
      return self._curvature_scores(stacked, tokens_MBT, tables)
    x_MBTD, (inputs_LMBTD, distance_L, moments_L) = self._forward(stacked, tokens_MBT, tables)
    loss, gradient_MBTD = self.head(stacked, x_MBTD, tokens_MBT, cross_entropy, 1 / (S * (T - 1)))
    if moments_L:
      kv, ffn, o_columns = self._column_scores(stacked['layers'], moments_L)
      return Scores(kv, ffn, distance_L, loss, o_columns)

    def run(i: jax.Array, layer: Params, x_BTD: jax.Array) -> jax.Array:
      return llama.apply_layer(self.config, self.shape, layer, x_BTD, tables.of(i))

    kv, ffn = self._group_scores(run, stacked['layers'], inputs_LMBTD, gradient_MBTD)
    return Scores(kv, ffn, distance_L, loss)

  def head(
    self,
    stacked: Params,
    x_MBTD: jax.Array,
    tokens_MBT: jax.Array,
    loss: ChunkLoss,
    scale: float,
    *extras_MBT: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """`scale` times the sum of a loss over all next tokens, and its gradient in x; the loss gets `extras`."""

    head_VD = whole(llama.head(stacked), self.dtype)

    def micro(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
      x_BTD, tokens_BT, *extras = xs
      labels, weights = shift(tokens_BT)

      def value(x: jax.Array) -> jax.Array:
        x_TD = llama.final_norm(self.config, stacked, x).reshape(-1, self.config.hidden_size)
        given = (labels, scale * weights, *(extra.reshape(-1) for extra in extras))
        return sum_over_chunks(capped(loss, self.config.logit_cap), x_TD, head_VD, given)

      return jax.value_and_grad(value)(x_BTD)

    losses_M, gradient_MBTD = jax.lax.map(micro, (x_MBTD, tokens_MBT, *extras_MBT))
    return losses_M.sum(), gradient_MBTD

  def _forward(
    self, stacked: Params, tokens_MBT: jax.Array, tables: PositionTables
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Moments]]:
    """The last layer's output and, for every layer, the input, the distance and the moments for `columns`."""
    x_MBTD = self.begin(stacked, tokens_MBT)
    forward = functools.partial(self.forward_layer, tables=tables)
    return jax.lax.scan(forward, x_MBTD, (self._indices, stacked['layers']))

  def begin(self, stacked: Params, tokens_MBT: jax.Array) -> jax.Array:
    """The stream before the first layer."""
    return embedded(self.config, stacked, tokens_MBT, self.dtype)

  def forward_layer(
    self, x_MBTD: jax.Array, xs: tuple[jax.Array, Params], tables: PositionTables
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Moments]]:
    """One layer of the forward scan; xs: its index and parameters."""
    config, shape, measure = self.config, self.shape, DISTANCES[self.distance]
    collect, (i, layer) = find_importance(self.importance).columns is not None, (xs[0], gathered(xs[1]))

    def run(x_BTD: jax.Array) -> tuple[jax.Array, Moments]:
      if not collect:
        return llama.apply_layer(config, shape, layer, x_BTD, tables.of(i)), {}
      x_BTD, o_inputs = llama.attend(config, shape, layer, x_BTD, tables.of(i))
      y_BTD, down_inputs = llama.feed(config, shape, layer, x_BTD)
      return y_BTD, {'o': _moments(o_inputs), 'down': _moments(down_inputs)}

    def micro(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Moments]:
      y_BTD, moments = run(x_BTD)
      return y_BTD, measure(x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)).sum(), moments

    y_MBTD, distance_M, moments_M = jax.lax.map(micro, x_MBTD)
    moments = {name: _merge(*parts) for name, parts in moments_M.items()}
    return y_MBTD, (x_MBTD, distance_M.sum() / (x_MBTD.size // config.hidden_size), moments)

  def _column_scores(self, layers: Params, moments_L: Moments) -> list[jax.Array]:
    """[kv [L, K], ffn [L, F], o_proj's columns [L, K, G, H], or [L, G, K, H] by query head]."""
    columns = find_importance(self.importance).columns
    assert columns is not None

    def score(_: None, xs: tuple[Params, Moments]) -> tuple[None, list[jax.Array]]:
      layer, moments = xs
      o_DKGH, down_DF = (x.astype(jnp.float32) for x in (layer['attention']['o'], layer['mlp']['down']))
      o_KGH = columns(o_DKGH, *(m.reshape(o_DKGH.shape[1:]) for m in moments['o']))
      by_unit = jnp.moveaxis(o_KGH, self.unit.axis, 0)
      return None, [by_unit.sum(2).sum(1), columns(down_DF, *moments['down']), by_unit]

    return jax.lax.scan(score, None, (layers, moments_L))[1]

  def score_layer(self, layer: Params, gradient: Params, fisher: Params) -> list[jax.Array]:
    """[kv [K], ffn [F]] of a layer from its weights, their gradient and its mean square over rows."""
    return group_scores(layer, gradient, fisher, find_importance(self.importance), self.unit)

  def _group_scores(
    self, run: Callable[..., jax.Array], layers: Params, inputs_LMBTD: jax.Array, gradient_MBTD: jax.Array
  ) -> list[jax.Array]:
    """[kv [L, K], ffn [L, F]]; `gradient_MBTD` is ∂L/∂x of the last layer's output."""
    importance, samples = find_importance(self.importance), gradient_MBTD.shape[0] * self.micro_batch

    if not importance.gradient:
      return jax.lax.scan(lambda _, layer: (None, self.score_layer(layer, layer, layer)), None, layers)[1]

    def pull(
      i: jax.Array, layer: Params, x_BTD: jax.Array, g_BTD: jax.Array
    ) -> tuple[Params, Params, jax.Array]:
      of_layer = functools.partial(run, i)
      if not importance.fisher:
        layer_gradient, x_gradient = jax.vjp(of_layer, layer, x_BTD)[1](g_BTD)
        return _to_fp32(layer_gradient), {}, x_gradient

      def one(x_TD: jax.Array, g_TD: jax.Array) -> tuple[Params, jax.Array]:
        layer_gradient, x_gradient = jax.vjp(of_layer, layer, x_TD[None])[1](g_TD[None])
        return _to_fp32(layer_gradient), x_gradient[0]

      each, x_gradient = jax.vmap(one)(x_BTD, g_BTD)
      total = jax.tree.map(lambda g: g.sum(0), each)
      # L is a mean over samples: a sample's own gradient is `samples` times its part of L's.
      fisher = jax.tree.map(lambda g: samples * jnp.square(g).sum(0), each)
      return total, fisher, x_gradient

    def backward(
      g_MBTD: jax.Array, xs: tuple[jax.Array, Params, jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
      i, layer, x_MBTD = xs
      used = gathered(layer)

      def micro(sums: tuple[Params, Params], xg: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        # Gathered again: else the compiler splits the weights as the sums are, and gathers them every time.
        gradient, fisher, x_gradient = pull(i, gathered(used), *xg)
        return constrain_params(jax.tree.map(jnp.add, sums, (gradient, fisher))), x_gradient

      zeros = constrain_params(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), layer))
      start = (zeros, zeros if importance.fisher else {})
      (gradient, fisher), g_MBTD = jax.lax.scan(micro, start, (x_MBTD, g_MBTD))
      return g_MBTD, self.score_layer(layer, gradient, fisher or gradient)

    return jax.lax.scan(backward, gradient_MBTD, (self._indices, layers, inputs_LMBTD), reverse=True)[1]

  def _curvature_scores(self, stacked: Params, tokens_MBT: jax.Array, tables: PositionTables) -> Scores:
    """Scores without any weight gradients; processes many rows in parts, to hold fewer of them at once."""
    layers, (M, B, T) = stacked['layers'], tokens_MBT.shape
    uniform_MBT = self.uniform(tokens_MBT)

    def forward(tokens_MBT: jax.Array, uniform_MBT: jax.Array) -> tuple[jax.Array, ...]:
      """The inputs of all layers, the last output's gradient, and shares of the distances and the loss."""
      x_MBTD, (inputs_LMBTD, distance_L, _) = self._forward(stacked, tokens_MBT, tables)
      scale = 1 / (M * B * (T - 1))
      loss, gradient_MBTD = self.head(stacked, x_MBTD, tokens_MBT, fisher_cross_entropy, scale, uniform_MBT)
      return inputs_LMBTD, gradient_MBTD, distance_L * (len(tokens_MBT) / M), loss

    def moments(
      i: jax.Array, layer: Params, x_MBTD: jax.Array, g_MBTD: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
      return self.layer_moments(layer, x_MBTD, g_MBTD, tables.of(i), M * B * T)

    if (parts := self.parts(M, B, T)) > 1:
      split = [x.reshape(parts, M // parts, B, T) for x in (tokens_MBT, uniform_MBT)]
      sums_L, distance_L, loss = self._summed(layers, split, forward, moments)
      kv, ffn = jax.lax.scan(lambda _, xs: (None, self.costs(*xs)), None, (layers, sums_L))[1]
      return Scores(kv, ffn, distance_L, loss)

    inputs_LMBTD, gradient_MBTD, distance_L, loss = forward(tokens_MBT, uniform_MBT)

    def backward(
      g_MBTD: jax.Array, xs: tuple[jax.Array, Params, jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
      g_MBTD, sums = moments(*xs, g_MBTD)
      return g_MBTD, self.costs(xs[1], sums)

    over = (self._indices, layers, inputs_LMBTD)
    kv, ffn = jax.lax.scan(backward, gradient_MBTD, over, reverse=True)[1]
    return Scores(kv, ffn, distance_L, loss)

  def _summed(
    self, layers: Params, parts: list[jax.Array], forward: Callable[..., Any], moments: Callable[..., Any]
  ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Moments of all layers, distances and loss, summed over parts."""
    L = self.config.num_layers

    def part(totals: Any, xs: Any) -> tuple[Any, None]:
      sums_L, distance_L, loss = totals
      inputs_LMBTD, gradient_MBTD, own_L, own = forward(*xs)

      def backward(carry: Any, xs: Any) -> tuple[Any, None]:
        (g_MBTD, sums_L), (index, layer, x_MBTD) = carry, xs
        g_MBTD, sums = moments(index, layer, x_MBTD, g_MBTD)
        added = [constrain(total.at[index].add(x), '.DF') for total, x in zip(sums_L, sums, strict=True)]
        return (g_MBTD, added), None

      over = (self._indices, layers, inputs_LMBTD)
      (_, sums_L), _ = jax.lax.scan(backward, (gradient_MBTD, sums_L), over, reverse=True)
      return (sums_L, distance_L + own_L, loss + own), None

    zeros = [constrain(jnp.zeros((L, n, n)), '.DF') for n in self._moment_sizes()]
    start: Any = zeros, jnp.zeros(L), jnp.zeros(())
    return jax.lax.scan(part, start, parts)[0]

  def _moment_sizes(self) -> tuple[int, int, int, int]:
    """Sizes of a layer's second moments: inputs of o_proj and down_proj, gradients at their outputs."""
    D = self.config.hidden_size
    return self.shape.num_heads * self.config.head_dim, self.shape.ffn, D, D

  def uniform(self, tokens_MBT: jax.Array) -> jax.Array:
    """The numbers by which ids are drawn: always the same, so that equal rows have equal scores."""
    return jax.random.uniform(jax.random.key(0), tokens_MBT.shape)

  def parts(self, M: int, B: int, T: int) -> int:
    """The number of parts in which M micro-batches are processed, keeping all layers' moments between parts.

    It is 1 if more parts would need no less memory than the inputs of all layers for all rows.
    """
    L, D = self.config.num_layers, self.config.hidden_size
    moments = L * 4 * sum(n * n for n in self._moment_sizes())
    inputs = L * M * B * T * D * jnp.dtype(self.dtype).itemsize / row_shards()  # on each device
    if inputs <= 2 * moments:
      return 1
    return next(n for n in range(1, M + 1) if M % n == 0 and (inputs / n <= moments or n == M))

  def layer_moments(
    self,
    layer: Params,
    x_MBTD: jax.Array,
    g_MBTD: jax.Array,
    positions: Positions,
    tokens: int,
  ) -> tuple[jax.Array, list[jax.Array]]:
    """The gradient at a layer's input, and its second moments: shares of means over `tokens` tokens."""
    config, shape, D = self.config, self.shape, self.config.hidden_size
    layer = gathered(layer)

    def half(block: str, x_BTD: jax.Array, *positions: Positions) -> tuple[jax.Array, Any, jax.Array]:
      """The stream after a block, its pullback to the stream before it and the block's output, and inputs."""

      def output(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return llama.output(block, config, shape, layer, x, *positions)

      def add(x: jax.Array, out: jax.Array) -> jax.Array:
        return llama.add(block, config, shape, layer, x, out)

      out_BTD, pull_output, inputs_TC = jax.vjp(output, x_BTD, has_aux=True)
      y_BTD, pull_add = jax.vjp(add, x_BTD, out_BTD)

      def pull(g_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        past_BTD, out_g_BTD = pull_add(g_BTD)
        return past_BTD + pull_output(out_g_BTD)[0], out_g_BTD

      return y_BTD, pull, inputs_TC

    def micro(sums: list[jax.Array], xg: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
      x_BTD, g_BTD = xg
      middle_BTD, pull_attention, o_TC = half('attention', x_BTD, positions)
      _, pull_mlp, down_TF = half('mlp', middle_BTD)
      g_BTD, down_g_BTD = pull_mlp(g_BTD)
      g_BTD, o_g_BTD = pull_attention(g_BTD)
      # Gradients of the sum over tokens: squared gradients of the mean would leave the range of fp32.
      outputs = [tokens * g.reshape(-1, D) for g in (o_g_BTD, down_g_BTD)]
      moments = [algebra.own_products(x, x) for x in (o_TC, down_TF, *outputs)]
      return jax.tree.map(jnp.add, sums, moments), g_BTD

    at_once = x_MBTD[0].size // D
    start = [algebra.no_products(at_once, n, n) for n in self._moment_sizes()]
    sums, g_MBTD = jax.lax.scan(micro, start, (x_MBTD, g_MBTD))
    return g_MBTD, [algebra.total(x) / tokens for x in sums]

  def costs(self, layer: Params, moments: list[jax.Array]) -> list[jax.Array]:
    """[kv [K], ffn [F]] of one layer from its second moments."""
    o_CC, down_FF, middle_DD, output_DD = moments
    layer = gathered(layer)
    o_DKGH, down_DF = (x.astype(jnp.float32) for x in (layer['attention']['o'], layer['mlp']['down']))
    kv_K = curvature.group_costs(o_DKGH, o_CC, middle_DD, self.unit)
    return [kv_K, curvature.channel_costs(down_DF, down_FF, output_DD)]


def _to_fp32(tree: Params) -> Params:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
