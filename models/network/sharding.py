"""Which axis of an array lies on which axis of the device mesh: one table for all, by dimension letter.

The mesh has the axes `data`, `fsdp` and `tensor` and is the one that `jax.set_mesh` has set; without one
(a single device) nothing here does anything. FSDP (Zhao et al., arXiv 2304.11277) splits the hidden size D
of every weight, which no pruning touches; tensor parallelism (Shoeybi et al., arXiv 1909.08053) splits KV
groups with their query heads, MLP channels and the vocabulary. Rows of a batch are split over `data` and
`fsdp` together.
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'tensor')
_ROWS = ('data', 'fsdp')
# B: rows of a batch, or all their tokens, rows first. Other letters of activations, '.', are not split.
_AXIS_OF: dict[str, Any] = {
  'B': _ROWS,
  'D': 'fsdp',
  'K': 'tensor',
  'N': 'tensor',
  'F': 'tensor',
  'V': 'tensor',
}

# Leaf -> its letters, without the layers' axis that stacked parameters have in front. What is not here, and
# vectors [D], lie whole on every device.
_LEAVES = {
  'embed': 'VD', 'lm_head': 'VD', 'q': 'KGHD', 'k': 'KHD', 'v': 'KHD', 'o': 'DKGH', 'q_bias': 'KGH',
  'k_bias': 'KH', 'v_bias': 'KH', 'gate': 'FD', 'up': 'FD', 'down': 'DF',
  'k_cache': 'BK..', 'v_cache': 'BK..',
}  # fmt: skip


def mesh() -> Any:
  """The mesh that is set, or None; outside jitted functions."""
  found = jax.sharding.get_mesh()
  return None if found.empty else found


def row_shards() -> int:
  """Among how many shares of the mesh the rows of a batch are split."""
  return _size(_ROWS)


def row_sharding() -> NamedSharding | None:
  """Of arrays whose first axis is the rows of a batch."""
  found = mesh()
  return found and NamedSharding(found, PartitionSpec(_ROWS))


def constrain(x: jax.Array, letters: str) -> jax.Array:
  """`x` split as `letters` says, inside a jitted function; an axis that cannot be split stays whole."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(letters, x.shape))


def constrain_params(tree: Any) -> Any:
  """A tree of parameters or gradients split as `shardings` says, inside a jitted function."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, jax.tree_util.tree_map_with_path(_leaf_spec, tree))


def gather_no_earlier(layer: Any, x: jax.Array) -> tuple[Any, jax.Array]:
  """Both as they are, but the layer's weights are not gathered from the devices before `x` is there.

  Nor, going back, does x's gradient go on before the layer's gradient is split. A compiler may otherwise
  gather all layers at the start, or keep all their gradients whole until the end.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return layer, x
  layer, x = jax.lax.optimization_barrier((layer, x))
  return constrain_params(layer), x


def shardings(tree: Any) -> Any:
  """A NamedSharding for every leaf of a pytree, by its name; None if no mesh is set.

  The tree may hold parameters, stacked or not, optimizer moments, gradients, or anything that has the leaves'
  names; all else is whole on every device. So is a vocabulary that the `tensor` axis does not divide.
  """
  if (found := mesh()) is None:
    return None
  specs = jax.tree_util.tree_map_with_path(_leaf_spec, tree)
  return jax.tree.map(lambda spec: NamedSharding(found, spec), specs)


def placed(tree: Any) -> Any:
  """The same tree of `jax.ShapeDtypeStruct` with the leaves' shardings, where a mesh is set."""
  if mesh() is None:
    return tree
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree))


def _size(axis: Any) -> int:
  sizes = jax.sharding.get_abstract_mesh().shape
  names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
  return math.prod(sizes[name] for name in names) if sizes else 1


def _spec(letters: str, shape: tuple[int, ...]) -> PartitionSpec:
  axes = (_AXIS_OF.get(letter) for letter in letters)
  return PartitionSpec(
    *(axis if size % _size(axis) == 0 else None for axis, size in zip(axes, shape, strict=False))
  )


def _leaf_spec(path: Any, leaf: Any) -> PartitionSpec:
  letters = _LEAVES.get(getattr(path[-1], 'key', ''), '') if path else ''
  if leaf.ndim == len(letters) + 1:
    letters = f'.{letters}'
  return _spec(letters, leaf.shape) if leaf.ndim == len(letters) else PartitionSpec()
