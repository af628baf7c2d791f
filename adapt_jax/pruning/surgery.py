"""Removing, zeroing and restoring groups: pure functions on parameter pytrees.

They work on parameters, gradients and optimizer moments alike, since all have the same tree structure.
A group's members (paper section 3.1): KV group k is index k of the K axis of q, k, v, o and the biases of
q, k, v; MLP channel c is index c of the F axis of gate, up, down. With query heads as the unit of attention,
unit g is index g of the G axis of q, its bias and o.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning.attention_units import KV_GROUPS, AttentionUnit
from adapt_jax.pruning.plan import PrunePlan

_MLP_AXES = {'gate': 0, 'up': 0, 'down': 1}


def group_axes(unit: AttentionUnit) -> dict[str, Mapping[str, int]]:
  """Block -> leaf -> its group axis. Leaves not named here are never pruned."""
  return {'attention': unit.axes, 'mlp': _MLP_AXES}


def map_groups(
  fn: Callable[[jax.Array, int, str], Any], layer: Params, unit: AttentionUnit = KV_GROUPS
) -> Params:
  """Applies fn(leaf, group axis, 'attention' or 'mlp') to a layer's prunable leaves; keeps the others."""
  out = dict(layer)
  for block, axes in group_axes(unit).items():
    out[block] = {n: fn(x, axes[n], block) if n in axes else x for n, x in layer[block].items()}
  return out


def _masks(plan: PrunePlan, layer: int) -> dict[str, np.ndarray]:
  return {'attention': plan.kv[layer], 'mlp': plan.ffn[layer]}


def compact(params: Params, plan: PrunePlan) -> Params:
  """The parameters without the groups that `plan` removes; `plan` uses the numbering of these parameters.

  `layers` becomes shorter if whole layers are removed.
  """

  def layer(tree: Params, i: int) -> Params:
    kept = {block: np.flatnonzero(m) for block, m in _masks(plan, i).items()}
    return map_groups(lambda x, axis, block: jnp.take(x, kept[block], axis=axis), tree, plan.unit)

  return params | {'layers': [layer(params['layers'][i], i) for i in np.flatnonzero(plan.present).tolist()]}


def zero(params: Params, plan: PrunePlan) -> Params:
  """The parameters with the groups that `plan` removes set to zero: the same function as `compact`.

  A layer without groups returns its input unchanged; its norms are kept.
  """

  def layer(tree: Params, i: int) -> Params:
    masks = _masks(plan, i)
    return map_groups(lambda x, axis, block: _masked(x, masks[block], axis), tree, plan.unit)

  return params | {'layers': [layer(tree, i) for i, tree in enumerate(params['layers'])]}


def _masked(x: jax.Array, mask: Any, *axes: int) -> jax.Array:
  """The array with zeros where the mask, which lies along these axes, is False."""
  others = [axis for axis in range(x.ndim) if axis not in axes]
  return jnp.where(jnp.expand_dims(mask, others), x, jnp.zeros((), x.dtype))


def stack(params: Params, plan: PrunePlan, dtype: Any = None) -> Params:
  """Puts compacted parameters back at their original indices, with zeros between, and stacks all layers.

  Layer leaves become [L, ...] at the widest layer's width: the fixed shape that scoring is compiled for.
  A removed layer is all zeros and returns its input unchanged. `params` are compacted to `plan`; all
  leaves are cast to `dtype`, or keep their own if it is None.
  """
  widest = {'attention': max(map(len, plan.kv)), 'mlp': max(map(len, plan.ffn))}

  def layer(tree: Params, i: int) -> Params:
    kept = {block: np.flatnonzero(m) for block, m in _masks(plan, i).items()}

    def restore(x: jax.Array, axis: int, block: str) -> jax.Array:
      shape = list(x.shape)
      shape[axis] = widest[block]
      index = (slice(None),) * axis + (kept[block],)
      return jnp.zeros(shape, dtype or x.dtype).at[index].set(x.astype(dtype or x.dtype))

    return map_groups(restore, tree, plan.unit)

  kept = np.flatnonzero(plan.present).tolist()
  restored = {i: layer(tree, i) for i, tree in zip(kept, params['layers'], strict=True)}
  gone = jax.tree.map(jnp.zeros_like, restored[kept[0]])
  layers = [restored.get(i, gone) for i in range(len(plan.kv))]

  def cast(x: jax.Array) -> jax.Array:
    return x.astype(dtype or x.dtype)

  outside = {name: cast(x) for name, x in params.items() if name != 'layers'}
  return outside | {'layers': jax.tree.map(lambda *xs: jnp.stack([cast(x) for x in xs]), *layers)}


def zero_stacked(
  stacked: Params, kv_LK: jax.Array, ffn_LF: jax.Array, unit: AttentionUnit = KV_GROUPS
) -> Params:
  """`zero` on parameters from `stack`, with masks padded to the widest layer."""
  masks = {'attention': kv_LK, 'mlp': ffn_LF}
  layers = map_groups(lambda x, axis, block: _masked(x, masks[block], 0, axis + 1), stacked['layers'], unit)
  return stacked | {'layers': layers}


def padded_masks(plan: PrunePlan) -> tuple[np.ndarray, np.ndarray]:
  """The plan's masks as two arrays [L, K] and [L, F], False beyond a narrower layer's width."""

  def pad(masks: tuple[np.ndarray, ...]) -> np.ndarray:
    out = np.zeros((len(masks), max(map(len, masks))), bool)
    for row, mask in zip(out, masks, strict=True):
      row[: len(mask)] = mask
    return out

  return pad(plan.kv), pad(plan.ffn)


def with_output_bias(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
  """Adds missing biases [D] to o_proj and down_proj, zeros of the weight's dtype: the same function.

  A bias belongs to no group, so no pruning removes it; training treats it as any other weight.
  """

  def layer(tree: Params) -> Params:
    biased = dict(tree)
    for block, weight in (('attention', 'o'), ('mlp', 'down')):
      w = tree[block][weight]
      biased[block] = {f'{weight}_bias': jnp.zeros(w.shape[:1], w.dtype)} | tree[block]
    return biased

  biased = params | {'layers': [layer(tree) for tree in params['layers']]}
  return dataclasses.replace(config, output_bias=True), biased


def compact_optimizer(state: Any, params: Params, plan: PrunePlan) -> Any:
  """The optimizer state of the remaining weights: compacts every subtree with the structure of `params`."""
  treedef: Any = jax.tree.structure(params)

  def like_params(x: Any) -> bool:
    return jax.tree.structure(x) == treedef

  return jax.tree.map(lambda x: compact(x, plan) if like_params(x) else x, state, is_leaf=like_params)
