"""SliceGPT: Ashkboos et al., arXiv 2401.15024. Narrows the residual stream to its principal components.

A norm whose gains are folded into the following projections commutes with a rotation. So the stream between
two blocks can be rotated to its principal components, and only the first d columns Q [D, d] of that rotation
are kept. Weights that read or write the stream are multiplied by Q, and the shortcut around a block, from Q
to the next Q', by Qᵀ Q' [d, d]. As in the authors' program, Q is computed layer by layer and before the norm,
on the output of the sliced layers before it. (Section 3.3 computes it after the norm: worse on SmolLM2.) The
shortcut matrices count as parameters, so a model has V·d + L·((2N + 2K)·H·d + 3·F·d) + 2L·d² parameters, and
d² more with tied embeddings or V·d more without.

The paper does not treat tied embeddings. Here the head is the sliced embedding E' = E Q₀ times one more
matrix M [d, d], the least-squares solution of E' M ≈ E γ Q over the table's rows. Q₀ is computed from the sum
of two second moments, each divided by its trace: that of the embeddings and that of the dense model's final
hidden states, which are multiplied by the same table.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import LayerShape, ModelConfig, count_params
from adapt_jax.models.network import llama
from adapt_jax.models.network.layers import rms_norm
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning.narrow import BLOCKS

METHOD = 'slicegpt'


def sliced_config(config: ModelConfig, width: int) -> ModelConfig:
  """The config of the model with a residual stream of `width` numbers."""
  return dataclasses.replace(config, hidden_size=width, sliced_from=config.hidden_size)


def width_for(config: ModelConfig, target: int) -> int:
  """The largest d with at most `target` stored parameters; 0 if d = 1 has more."""
  widths = range(config.hidden_size, 0, -1)
  return next((d for d in widths if count_params(sliced_config(config, d)) <= target), 0)


def slice_model(
  config: ModelConfig, params: Params, tokens: jax.Array, width: int, *, dtype: Any, compiler: Compiler
) -> Params:
  """The parameters of `sliced_config(config, width)`, each in its original dtype.

  Args:
    params: parameters of a model that is not sliced.
    tokens: calibration rows [M, B, T]; a layer processes B of them at once.
    dtype: dtype of activations.
    compiler: counts compiles as `slicing`, one for each kind of block and shape of layer.

  Raises `Preempted` between layers.
  """
  stream = _Stream(config, params, tokens, dtype, compiler)
  rotations = [principal(stream.moment, width)]
  if config.tie_embeddings:
    rotations = [principal(_of_both(stream), width)]
    stream.start()
  with Progress('slice', config.num_layers, 'layers') as progress:
    for layer in range(config.num_layers):
      preemption.check()
      for block in BLOCKS:
        stream.through(block, layer, rotations[-1])
        rotations.append(principal(stream.moment, width))
      progress.update(1)
  return apply_rotations(params, rotations)


def _of_both(stream: '_Stream') -> np.ndarray:
  """The sum of the second moments of embeddings and final states, each over its trace. Uses up the stream."""
  entering, layers = stream.moment, stream.config.num_layers
  with Progress('slice: dense', layers, 'layers') as progress:
    for layer in range(layers):
      preemption.check()
      for block in BLOCKS:
        stream.through(block, layer)
      progress.update(1)
  moments = (np.asarray(moment, np.float64) for moment in (entering, stream.final_moment()))
  return sum(moment / np.trace(moment) for moment in moments)


def principal(moment_DD: Any, width: int) -> np.ndarray:
  """The eigenvectors of the `width` largest eigenvalues of a symmetric matrix, as columns [D, width]."""
  vectors = np.linalg.eigh(np.asarray(moment_DD, np.float64))[1]
  return vectors[:, ::-1][:, :width].astype(np.float32)


class _Stream:
  """The residual stream of the calibration rows, in the basis of the dense model.

  `moment` [D, D] is the sum over tokens of x xᵀ.
  """

  moment: jax.Array

  def __init__(self, config: ModelConfig, params: Params, tokens: jax.Array, dtype: Any, compiler: Compiler):
    self.config, self._params, self._tokens, self._dtype = config, params, tokens, dtype
    self._compiler = compiler
    self._programs: dict[tuple[str, LayerShape], Any] = {}
    self.start()

  def start(self) -> None:
    """Resets the stream to the embeddings, before the first block."""
    self._x = jnp.stack([llama.embed(self.config, self._params, rows, self._dtype) for rows in self._tokens])
    self.moment = jax.jit(_moment)(self._x)

  def through(self, block: str, layer: int, rotation_Dd: np.ndarray | None = None) -> None:
    """Slices the stream, if a rotation is given, and applies a block of the dense model to it."""
    shape, whole = self.config.layers[layer], np.eye(self.config.hidden_size, dtype=np.float32)
    # The columns are orthonormal, so the projected stream has the norm of the sliced model's stream.
    left_DD = whole if rotation_Dd is None else jnp.matmul(rotation_Dd, rotation_Dd.T, precision='highest')
    args = self._params['layers'][layer], left_DD, self._x

    def run(layer: Params, left_DD: jax.Array, x_MBTD: jax.Array) -> tuple[jax.Array, jax.Array]:
      def one(x_BTD: jax.Array) -> jax.Array:
        x_BTD = jnp.matmul(x_BTD.astype(jnp.float32), left_DD, precision='highest').astype(x_BTD.dtype)
        if block == 'mlp':
          return llama.feed(self.config, shape, layer, x_BTD)[0]
        positions = llama.rope(self.config, x_BTD.shape[1]).of(0)  # the same in all layers
        return llama.attend(self.config, shape, layer, x_BTD, positions)[0]

      y_MBTD = jax.lax.map(one, x_MBTD)
      return y_MBTD, _moment(y_MBTD)

    if (block, shape) not in self._programs:
      self._programs[block, shape] = self._compiler('slicing', run, *args, donate_argnums=(2,))
    self._x, self.moment = self._programs[block, shape](*args)

  def final_moment(self) -> jax.Array:
    """Like `moment`, but after the final norm."""

    def of_normed(x_MBTD: jax.Array, weight_D: jax.Array) -> jax.Array:
      return _moment(rms_norm(x_MBTD, weight_D, self.config.rms_norm_eps))

    return jax.jit(of_normed)(self._x, self._params['norm'])


def _moment(x_MBTD: jax.Array) -> jax.Array:
  """The sum over tokens of x xᵀ in fp32, [D, D]."""
  D = x_MBTD.shape[-1]

  def add(total_DD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, None]:
    x_TD = x_BTD.astype(jnp.float32).reshape(-1, D)
    return total_DD + jnp.matmul(x_TD.T, x_TD, precision='highest'), None

  return jax.lax.scan(add, jnp.zeros((D, D)), x_MBTD)[0]


def apply_rotations(params: Params, rotations: list[np.ndarray]) -> Params:
  """The sliced parameters, from the rotations [D, d] of the stream before every block and after the last."""
  pairs: Iterator[tuple[np.ndarray, np.ndarray]] = iter(zip(rotations[:-1], rotations[1:], strict=True))
  layers = []
  for layer in params['layers']:
    sliced: Params = {}
    for block, (norm, reads, writes) in BLOCKS.items():
      before, after = next(pairs)
      inner, gains = dict(layer[block]), layer[norm].astype(jnp.float32)
      for name in reads:
        inner[name] = _times(inner[name] * gains, before, inner[name].dtype)
      for name in writes:
        if name in inner:
          inner[name] = _times(after.T, inner[name], inner[name].dtype)
      kept = layer[block][reads[0]].dtype
      sliced |= {block: inner, f'{block}_shortcut': _times(after.T, before, kept)}
    layers.append(sliced)
  embed, first, last = params['embed'], rotations[0], rotations[-1]
  out: Params = {'embed': _times(embed, first, embed.dtype), 'layers': layers}
  gains = params['norm'].astype(jnp.float32)
  if 'lm_head' in params:
    return out | {'lm_head': _times(params['lm_head'] * gains, last, params['lm_head'].dtype)}
  table = np.asarray(embed, np.float64)
  gram = table.T @ table
  inverse = np.linalg.inv(first.T @ gram @ first)
  rotation = inverse @ first.T @ gram @ (np.asarray(gains)[:, None] * last)
  return out | {'head_rotation': jnp.asarray(rotation, embed.dtype)}


def _times(a: Any, b: Any, dtype: Any) -> jax.Array:
  """The product over a's last axis and b's first, in `dtype`."""
  a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
  return jnp.tensordot(a, b, 1, precision='highest').astype(dtype)
