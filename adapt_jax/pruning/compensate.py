"""Adjusts the remaining weights of o_proj and down_proj to compensate for the removed ones, without training.

One pass over the layers, from first to last, on the calibration rows. It computes the activations of the
pruned model, so that a layer is also corrected for errors of earlier layers, and those of the model before
this pruning. `least_squares` solves for each output projection W [D, C] on its remaining columns:

    minimise Σ over tokens ‖ t − W' c ‖² + λ ‖ W' − W ‖²,    c its input, pruned columns zero,
    t = (1 − m) · W c₀ + m · (r₀ − x)

where c₀ is the input with nothing pruned in this layer, x the residual stream that the projection adds to,
and r₀ the stream after the projection in the model before this pruning. The target t preserves the layer's
output and pulls the stream back to r₀. Where the output is scaled before it is added (Granite), r₀ − x is
divided by the scale; where it is normed (Gemma, OLMo 2), it is replaced by the output in the model before.

`bias` instead adds the mean of W (c₀ − c) to a bias, as FLAP does (An et al., arXiv 2312.11983, section 3.3,
with the means of the unpruned model). Solved in fp32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.positions import Positions
from adapt_jax.models.network.sharding import constrain, constrain_params, gathered
from adapt_jax.pruning import algebra
from adapt_jax.pruning.attention_units import KV_GROUPS, AttentionUnit
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer, embedded, micro_batches

# λ is a share of the median over channels of Σ c² (`algebra.damped`). The first part is for text unlike the
# calibration rows; the second is for the noise of moments that few tokens estimate, which grows with kept
# inputs / tokens. No ridge above the largest was tried. PULL is m above.
RIDGE, RIDGE_FOR_EVIDENCE, LARGEST_RIDGE, PULL = 0.1, 4.0, 0.8, 0.5

# The residual streams of the model before this pruning and of the pruned one, each [M, B, T, D].
Streams = tuple[jax.Array, jax.Array]
# Projection -> its block and its bias.
_OUTPUTS = {'o': ('attention', 'o_bias'), 'down': ('mlp', 'down_bias')}


@dataclasses.dataclass(frozen=True)
class Compensator:
  """The program `compensator(stacked, masks, tokens)`: the changes of all layers' output projections.

  Args:
    config: the model at its original widths.
    kind: least_squares or bias; the latter needs `config.output_bias`.
    micro_batch: rows that a layer processes at once; must divide the number of rows.
    dtype: dtype of weights and activations.
    unit: what is removed from attention.
  """

  config: ModelConfig
  kind: str
  micro_batch: int
  dtype: Any = jnp.float32
  unit: AttentionUnit = KV_GROUPS

  def __call__(
    self, stacked: Params, masks: tuple[jax.Array, jax.Array], tokens_ST: jax.Array
  ) -> dict[str, jax.Array]:
    """Changes to add, in fp32: {'o': [L, D, K, G, H], 'down': [L, D, F]}, or {'o_bias', 'down_bias': [L, D]}.

    Args:
      stacked: the model before this pruning, from `surgery.stack`.
      masks: the groups to keep, [L, K] and [L, F], from `surgery.padded_masks`.
      tokens_ST: the calibration rows.
    """
    over = (jnp.arange(self.config.num_layers), stacked['layers'], *masks)
    return jax.lax.scan(self.layer, self.begin(stacked, tokens_ST), over)[1]

  def begin(self, stacked: Params, tokens_ST: jax.Array) -> Streams:
    """Both streams before the first layer."""
    tokens_MBT = micro_batches(tokens_ST, self.micro_batch)
    x_MBTD = embedded(self.config, stacked, tokens_MBT, self.dtype)
    return x_MBTD, x_MBTD

  def layer(
    self, streams: Streams, xs: tuple[jax.Array, Params, jax.Array, jax.Array]
  ) -> tuple[Streams, dict[str, jax.Array]]:
    """Both streams after a layer, and its changes; xs: its index, its parameters and what it keeps."""
    i, layer, kv_K, ffn_F = xs
    layer, tables = gathered(layer), llama.rope(self.config, streams[0].shape[2])
    sizes_KGH = layer['attention']['o'].shape[1:]
    along = jnp.expand_dims(kv_K, [axis for axis in range(3) if axis != self.unit.axis])
    o_mask = jnp.broadcast_to(along, sizes_KGH).reshape(-1)
    streams, o_change = self._half('o', layer, o_mask, streams, tables.of(i))
    streams, down_change = self._half('down', layer, ffn_F, streams)
    return streams, o_change | down_change

  def _half(
    self, name: str, layer: Params, mask_C: jax.Array, streams: Streams, *positions: Positions
  ) -> tuple[Streams, dict[str, jax.Array]]:
    """Both streams after one projection, and the change of its weight or bias.

    Args:
      layer: the unpruned layer. mask_C: which inputs of the projection are kept.
      streams: both streams before it, each [M, B, T, D].
    """
    block, bias = _OUTPUTS[name]
    weight = layer[block][name].astype(jnp.float32)
    weight_DC = weight.reshape(len(weight), -1)
    (D, C), shape = weight_DC.shape, Scorer(self.config, unit=self.unit).shape

    def run(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
      return llama.output(block, self.config, shape, layer, x_BTD, *positions)

    def add(x_BTD: jax.Array, out_BTD: jax.Array) -> jax.Array:
      return llama.add(block, self.config, shape, layer, x_BTD, out_BTD)

    def measure(sums: list[jax.Array], xs: Streams) -> tuple[list[jax.Array], jax.Array]:
      (given_BTD, _), (own_BTD, inputs_TC) = run(xs[0]), run(xs[1])
      before_BTD = add(xs[0], given_BTD)
      if self.config.traits.post_norm:
        pull_BTD = given_BTD - own_BTD
      else:
        pull_BTD = (before_BTD - add(xs[1], own_BTD)) / self.config.residual_scale
      pull_TD = PULL * pull_BTD.reshape(-1, D)  # also exact in bfloat16, since PULL is 1/2
      kept_TC = jnp.where(mask_C, inputs_TC, 0)
      products = algebra.own_products(inputs_TC, inputs_TC), algebra.own_products(pull_TD, kept_TC)
      return jax.tree.map(jnp.add, sums, [*products, inputs_TC.astype(jnp.float32).sum(0)]), before_BTD

    at_once, tokens = streams[0][0].size // D, streams[0].size // D
    start = [algebra.no_products(at_once, C, C), algebra.no_products(at_once, D, C), jnp.zeros(C)]
    (inputs_RCC, pulled_RDC, inputs_C), before_MBTD = jax.lax.scan(measure, start, streams)
    change_DC, change_D = jnp.zeros((D, C)), jnp.zeros(D)
    if self.kind == 'bias':
      with algebra.exact():
        change_D = weight_DC @ jnp.where(mask_C, 0, inputs_C) / tokens
    else:
      inputs_CC = jnp.where(mask_C, algebra.total(inputs_RCC), 0)
      with algebra.exact():  # Σ over tokens of (W (c₀ − c)) cᵀ
        missing_DC = jnp.where(mask_C, 0, weight_DC) @ inputs_CC
      ridge = jnp.minimum(RIDGE + RIDGE_FOR_EVIDENCE * mask_C.sum() / tokens, LARGEST_RIDGE)
      damped_CC = algebra.damped(jnp.where(mask_C[:, None], inputs_CC, 0), ridge)
      products_DC = missing_DC + algebra.total(pulled_RDC)
      change_DC = constrain(algebra.solve(damped_CC, products_DC.T).T, '.F')
    # All of D on each device, for the loop below.
    new_DC, new_D = constrain(weight_DC + change_DC, '.F'), change_D + layer[block].get(bias, 0.0)

    def corrected(x_BTD: jax.Array) -> jax.Array:
      _, inputs_TC = run(x_BTD)
      with algebra.exact():
        out_TD = jnp.where(mask_C, inputs_TC.astype(jnp.float32), 0) @ new_DC.T + new_D
      after_BTD = add(x_BTD, out_TD.astype(x_BTD.dtype).reshape(x_BTD.shape))
      return jnp.where(mask_C.any(), after_BTD, x_BTD)  # a removed layer has no bias either

    after_MBTD = jax.lax.map(corrected, streams[1])
    change = {bias: change_D} if self.kind == 'bias' else {name: change_DC.reshape(weight.shape)}
    return (before_MBTD, after_MBTD), constrain_params(change)


def add(params: Params, compacted: PrunePlan, changes: dict[str, jax.Array]) -> Params:
  """Adds the changes of a `Compensator` to `params`, which are compacted to `compacted`."""
  layers = []
  for i, tree in zip(np.flatnonzero(compacted.present).tolist(), params['layers'], strict=True):
    kept = {'o': np.flatnonzero(compacted.kv[i]), 'down': np.flatnonzero(compacted.ffn[i])}
    layer = dict(tree)
    for name, (block, bias) in _OUTPUTS.items():
      if name in changes:
        axis = 1 + compacted.unit.axis if name == 'o' else 1
        leaf, change = name, jnp.take(changes[name][i], kept[name], axis=axis)
      else:
        leaf, change = bias, changes[bias][i]
      layer[block] = layer[block] | {leaf: layer[block][leaf] + change.astype(layer[block][leaf].dtype)}
    layers.append(layer)
  return params | {'layers': layers}
