"""Narrows the residual stream of a whole model: a smaller hidden size, the same in all layers.

A norm whose gains are folded into the projections after it commutes with a rotation (SliceGPT: Ashkboos et
al., arXiv 2401.15024). SliceGPT rotates each block by itself, which needs a matrix in every shortcut. Here
all layers have one basis Q [D, d]: the principal components of the normed stream before every block and, L
times as heavy, after the last. So the result has the same modules as before.

    embed' = embed Q        norm' = 1        q' = q γ √(D/d) Q, and so k, v, gate, up        o' = Qᵀ o, down'

√(D/d) and the new epsilon ε D/d make the norm of the d numbers divide by the root mean square of D. A tied
table cannot take the final gains γ. There norm' is the diagonal of √(D/d) Qᵀ γ Q, and up to an eighth of the
columns of Q are axes of the old stream: those with the largest |γ − median γ| · σ above 0, where σ is the
root mean square of the final stream on that axis. Without them, SmolLM2's few extreme gains ruin the model.

Then the weights are fitted, layer by layer on the calibration rows, to the dense model's stream, by ridge
regression that draws them to the values above: what reads the stream, to the dense normed stream; what
writes to it, half to the dense block's output and half to the difference of both streams after it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.machine import mesh
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.processes import from_first_process, say
from adapt_jax.machine.progress import phase
from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import loop_options
from adapt_jax.models.network.layers import rms_norm
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.positions import Positions
from adapt_jax.models.network.sharding import constrain, constrain_params, gathered
from adapt_jax.pruning import algebra, surgery
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer, embedded, micro_batches

# λ, as a share of the mean of Σ x² for what reads the stream, and of the median (`algebra.damped`) for what
# writes to it. Share of the streams' difference in the target. One in `_AXES` columns is an old axis, with
# tied tables.
_READ_RIDGE, _WRITE_RIDGE, _PULL, _AXES = 0.1, 0.2, 0.5, 8

# Block -> its norm, the weights that read the stream (last axis) and those that write to it (first axis).
BLOCKS = {
  'attention': ('attention_norm', ('q', 'k', 'v'), ('o', 'o_bias')),
  'mlp': ('mlp_norm', ('gate', 'up'), ('down', 'down_bias')),
}
# The residual streams of the dense model [M, B, T, D] and of the narrowed one [M, B, T, d].
Streams = tuple[jax.Array, jax.Array]


def check(config: ModelConfig, width: int, field: str) -> None:
  """Raises InputError, naming `field`, for a model that cannot be narrowed and for a width out of range."""
  if not config.traits.pre_norm or config.traits.post_norm:
    raise InputError(
      f'{field} = {width} does not work for {config.family} models: they norm the outputs of their blocks, '
      f'so the stream cannot be rotated; leave it out'
    )
  if len({shape.group_size for shape in config.layers}) > 1:
    raise InputError(
      f'{field} = {width} needs layers with equally many query heads for each KV head: narrow the model '
      f'before its query heads are pruned, or leave it out'
    )
  if not 0 < width < config.hidden_size:
    raise InputError(f'{field} = {width} must be from 1 to {config.hidden_size - 1}, below the hidden size')


def narrowed_config(config: ModelConfig, width: int) -> ModelConfig:
  """The config of the model with a residual stream of `width` numbers; 0 leaves it as it is."""
  if not width:
    return config
  eps = config.rms_norm_eps * config.hidden_size / width
  return dataclasses.replace(config, hidden_size=width, rms_norm_eps=eps)


@dataclasses.dataclass(frozen=True)
class StreamMoments:
  """The program `moments(stacked, tokens)`: second moments of the normed stream, Σ over tokens of x xᵀ.

  Args:
    config: the dense model.
    micro_batch: rows that a layer processes at once; must divide the number of rows.
    dtype: dtype of activations.
  """

  config: ModelConfig
  micro_batch: int
  dtype: Any = jnp.float32

  def __call__(self, stacked: Params, tokens_ST: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the inputs of all blocks together, and of the final norm's output without gains, each [D, D]."""
    tokens_MBT = micro_batches(tokens_ST, self.micro_batch)
    tables, shape = llama.rope(self.config, tokens_ST.shape[1]), Scorer(self.config).shape
    D = self.config.hidden_size

    def moment(x_BTD: jax.Array) -> jax.Array:
      x_TD = _normed(x_BTD, self.config.rms_norm_eps)
      return algebra.own_products(x_TD, x_TD)

    def step(
      carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, Params]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
      i, layer = xs[0], gathered(xs[1])

      def micro(sum_RDD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        between_BTD = llama.attend(self.config, shape, layer, x_BTD, tables.of(i))[0]
        after_BTD = llama.feed(self.config, shape, layer, between_BTD)[0]
        return sum_RDD + moment(x_BTD) + moment(between_BTD), after_BTD

      x_MBTD, sum_RDD = carry
      sum_RDD, x_MBTD = jax.lax.scan(micro, sum_RDD, x_MBTD)
      return (x_MBTD, sum_RDD), None

    def last(sum_RDD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, None]:
      return sum_RDD + moment(x_BTD), None

    zeros_RDD = algebra.no_products(tokens_MBT[0].size, D, D)
    x_MBTD = embedded(self.config, stacked, tokens_MBT, self.dtype)
    indexed = jnp.arange(self.config.num_layers), stacked['layers']
    (x_MBTD, blocks_RDD), _ = jax.lax.scan(step, (x_MBTD, zeros_RDD), indexed)
    final_RDD = jax.lax.scan(last, zeros_RDD, x_MBTD)[0]
    blocks_DD, final_DD = (constrain(algebra.total(x), '..') for x in (blocks_RDD, final_RDD))
    return blocks_DD, final_DD


def basis(
  config: ModelConfig, gains_D: np.ndarray, blocks_DD: np.ndarray, final_DD: np.ndarray, width: int
) -> np.ndarray:
  """Q: orthonormal columns, float32 [D, width], from the final gains and the results of `StreamMoments`."""
  total_DD = np.asarray(blocks_DD, np.float64) + config.num_layers * np.asarray(final_DD, np.float64)
  deviation_D = np.abs(gains_D - np.median(gains_D)) * np.sqrt(np.diagonal(final_DD))
  axes = min(width // _AXES, int(np.count_nonzero(deviation_D))) if config.tie_embeddings else 0
  order_D = np.argsort(-deviation_D, kind='stable')
  kept, rest = order_D[:axes], np.sort(order_D[axes:])
  vectors = np.linalg.eigh(total_DD[np.ix_(rest, rest)])[1][:, ::-1][:, : width - axes]
  basis_Dd = np.zeros((config.hidden_size, width), np.float32)
  basis_Dd[kept, np.arange(axes)] = 1.0
  basis_Dd[rest, axes:] = vectors
  return basis_Dd


@dataclasses.dataclass(frozen=True)
class Narrower:
  """The program `narrower(stacked, basis, tokens)`: the narrowed model's parameters, still stacked, in fp32.

  Args: those of `StreamMoments`, and width: d, below the hidden size.
  """

  config: ModelConfig
  micro_batch: int
  dtype: Any
  width: int

  @property
  def small(self) -> ModelConfig:
    """The narrowed model."""
    return narrowed_config(self.config, self.width)

  @property
  def _scale(self) -> float:
    return float((self.config.hidden_size / self.width) ** 0.5)

  @property
  def _shape(self) -> LayerShape:
    return Scorer(self.config).shape

  def __call__(self, stacked: Params, basis_Dd: jax.Array, tokens_ST: jax.Array) -> Params:
    """stacked: from `surgery.stack`. basis_Dd: from `basis`. tokens_ST: the calibration rows."""
    tokens_MBT = micro_batches(tokens_ST, self.micro_batch)
    tables = llama.rope(self.config, tokens_ST.shape[1])
    out = self._outside(stacked, basis_Dd)
    x_MBTD = embedded(self.config, stacked, tokens_MBT, self.dtype)
    y_MBTd = embedded(self.small, out, tokens_MBT, self.dtype)

    def fit(streams: Streams, xs: tuple[jax.Array, Params]) -> tuple[Streams, Params]:
      return self._fitted(gathered(xs[1]), basis_Dd, streams, tables.of(xs[0]))

    indexed = jnp.arange(self.config.num_layers), stacked['layers']
    streams, layers = jax.lax.scan(fit, (x_MBTD, y_MBTd), indexed)
    if 'lm_head' in stacked:
      gains_D = stacked['norm'].astype(jnp.float32)
      out['lm_head'] = _read(stacked['lm_head'], gains_D, self._reader(streams, basis_Dd))
    return constrain_params(out | {'layers': layers})

  def _outside(self, stacked: Params, basis_Dd: jax.Array) -> Params:
    """Embedding and final norm."""
    out: Params = {'embed': _read(stacked['embed'], 1.0, basis_Dd), 'norm': jnp.ones(self.width)}
    if 'lm_head' not in stacked:
      gains = stacked['norm'].astype(jnp.float32)
      out['norm'] = self._scale * jnp.sum(jnp.square(basis_Dd) * gains[:, None], 0)
    return out

  def _reader(self, streams: Streams, basis_Dd: jax.Array) -> jax.Array:
    """The matrix [D, d] that takes the narrowed model's normed stream to the dense one's."""
    D, d = basis_Dd.shape

    def micro(sums: Streams, xs: Streams) -> tuple[Streams, None]:
      dense_TD = _normed(xs[0], self.config.rms_norm_eps)
      own_Td = _normed(xs[1], self.small.rms_norm_eps)
      new = algebra.own_products(own_Td, own_Td), algebra.own_products(dense_TD, own_Td)
      return (sums[0] + new[0], sums[1] + new[1]), None

    tokens = streams[0][0].size // D
    start = algebra.no_products(tokens, d, d), algebra.no_products(tokens, D, d)
    own_dd, both_Dd = map(algebra.total, jax.lax.scan(micro, start, streams)[0])
    ridge = _READ_RIDGE * jnp.trace(own_dd) / d
    right_Dd = both_Dd + ridge * self._scale * basis_Dd
    return constrain(algebra.solve(own_dd + ridge * jnp.eye(d), right_Dd.T).T, '..')

  def _fitted(
    self, layer: Params, basis_Dd: jax.Array, streams: Streams, positions: Positions
  ) -> tuple[Streams, Params]:
    """Both streams after a layer, and the layer of the narrowed model."""
    fitted = dict(layer)
    for norm, *_ in BLOCKS.values():
      fitted[norm] = jnp.ones(self.width)
    for block, (norm, reads, writes) in BLOCKS.items():
      reader_Dd, inner = self._reader(streams, basis_Dd), dict(layer[block])
      for name in reads:
        inner[name] = _read(inner[name], layer[norm].astype(jnp.float32), reader_Dd)
      for name in writes:
        if name in inner:
          with algebra.exact():
            inner[name] = jnp.tensordot(basis_Dd.T, inner[name].astype(jnp.float32), 1)
      fitted[block] = constrain_params(inner)
      at = (positions,) if block == 'attention' else ()
      streams, change = self._written(block, layer, fitted, basis_Dd, streams, *at)
      output = writes[0]
      fitted[block] = inner | {output: inner[output] + change.reshape(inner[output].shape)}
    return streams, constrain_params(jax.tree.map(lambda x: x.astype(jnp.float32), fitted))

  def _written(
    self,
    block: str,
    layer: Params,
    fitted: Params,
    basis_Dd: jax.Array,
    streams: Streams,
    *positions: Positions,
  ) -> tuple[Streams, jax.Array]:
    """Both streams after a block, and the change [d, C] of the weight that writes its output."""
    d, small, shape = self.width, self.small, self._shape
    fitted = gathered(fitted)
    C = fitted[block][BLOCKS[block][2][0]].size // d

    def run(x_BTD: jax.Array, y_BTd: jax.Array) -> tuple[jax.Array, ...]:
      dense_BTD, _ = llama.output(block, self.config, shape, layer, x_BTD, *positions)
      own_BTd, inputs_TC = llama.output(block, small, shape, fitted, y_BTd, *positions)
      return dense_BTD, own_BTd, inputs_TC.astype(jnp.float32)

    basis_Dd = constrain(basis_Dd, '..')

    def measure(sums: Streams, xs: Streams) -> tuple[Streams, None]:
      dense_BTD, own_BTd, inputs_TC = run(*xs)
      after_BTD = llama.add(block, self.config, shape, layer, xs[0], dense_BTD)
      with algebra.exact():
        dense_Td, after_Td = (_flat(x) @ basis_Dd for x in (dense_BTD, after_BTD))
        pull_Td = (after_Td - _flat(xs[1])) / small.residual_scale
      missing_Td = (1 - _PULL) * dense_Td + _PULL * pull_Td - _flat(own_BTd)
      new = algebra.own_products(inputs_TC, inputs_TC), algebra.own_products(missing_Td, inputs_TC)
      return (sums[0] + new[0], sums[1] + new[1]), None

    tokens = streams[1][0].size // d
    start = algebra.no_products(tokens, C, C), algebra.no_products(tokens, d, C)
    inputs_CC, products_dC = map(algebra.total, jax.lax.scan(measure, start, streams)[0])
    change_dC = constrain(algebra.solve(algebra.damped(inputs_CC, _WRITE_RIDGE), products_dC.T).T, '.F')

    def advance(xs: Streams) -> Streams:
      dense_BTD, own_BTd, inputs_TC = run(*xs)
      with algebra.exact():
        more_Td = inputs_TC @ change_dC.T
      own_BTd += more_Td.astype(own_BTd.dtype).reshape(own_BTd.shape)
      return (
        llama.add(block, self.config, shape, layer, xs[0], dense_BTD),
        llama.add(block, small, shape, fitted, xs[1], own_BTd),
      )

    return jax.lax.map(advance, streams), change_dC


def _normed(x_BTD: jax.Array, eps: float) -> jax.Array:
  """A stream, normed without gains, in fp32 [B·T, D]."""
  width = x_BTD.shape[-1]
  return rms_norm(x_BTD.astype(jnp.float32), jnp.ones(width), eps).reshape(-1, width)


def _read(weight: jax.Array, gains: Any, reader_Dd: jax.Array) -> jax.Array:
  """A weight that reads the stream: [..., D] times the gains and a matrix, in fp32."""
  with algebra.exact():
    return jnp.tensordot(weight.astype(jnp.float32) * gains, reader_Dd, 1)


def _flat(x_BTd: jax.Array) -> jax.Array:
  return x_BTd.astype(jnp.float32).reshape(-1, x_BTd.shape[-1])


def unstacked(config: ModelConfig, stacked: Params, like: Params) -> Params:
  """The parameters of `config` from stacked ones, each in the dtype of its leaf in `like`."""

  def layer(i: int, shape: LayerShape) -> Params:
    own = jax.tree.map(lambda x: x[i], stacked['layers'])
    widths = {'attention': shape.num_kv_heads, 'mlp': shape.ffn}
    return surgery.map_groups(
      lambda x, axis, block: jax.lax.slice_in_dim(x, 0, widths[block], axis=axis), own
    )

  whole = stacked | {'layers': [layer(i, shape) for i, shape in enumerate(config.layers)]}
  return jax.tree.map(lambda x, kept: x.astype(kept.dtype), whole, like)


def narrow(
  config: ModelConfig,
  params: Params,
  tokens_ST: jax.Array,
  width: int,
  *,
  micro_batch: int,
  dtype: Any,
  compiler: Compiler,
) -> Params:
  """The parameters of `narrowed_config(config, width)`, each in its original dtype.

  Args:
    params: those of the dense model, placed on the mesh if there is one.
    tokens_ST: the calibration rows. micro_batch, dtype: as for `StreamMoments`.
    compiler: counts both compiles as `narrowing`.

  Raises InputError if the result is not finite.
  """
  plan, like = PrunePlan.dense(config), jax.eval_shape(lambda tree: tree, params)
  say(f'narrowing the residual stream from {config.hidden_size} to {width} on {tokens_ST.size:,} tokens')
  # In their own dtypes: what is not fitted keeps its precision.
  stacked = mesh.jit(lambda params: surgery.stack(params, plan), params, once=True)(params)
  del params
  moments = StreamMoments(config, micro_batch, dtype)
  measure = compiler('narrowing', moments, stacked, tokens_ST, xla_options=loop_options())
  with phase('measuring the residual stream'):
    blocks_DD, final_DD = jax.device_get(measure(stacked, tokens_ST))
    gains_D = np.asarray(stacked['norm'], np.float32)
    # Eigenvectors may differ by sign, or more, on other hosts.
    basis_Dd = from_first_process(basis(config, gains_D, blocks_DD, final_DD, width))
  fit = Narrower(config, micro_batch, dtype, width)
  program = compiler('narrowing', fit, stacked, basis_Dd, tokens_ST, xla_options=loop_options())
  with phase('narrowing'):
    narrowed = jax.block_until_ready(program(stacked, basis_Dd, tokens_ST))
    del stacked
    unstack = mesh.jit(lambda stacked: unstacked(config, stacked, like), narrowed, once=True)
    small: Params = unstack(narrowed)
  algebra.check_finite(small, f'narrow.hidden = {width} gives weights that are')
  return small
