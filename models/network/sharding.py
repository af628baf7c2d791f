"""Sharding: one table maps the axes of arrays, by dimension letter, to the axes of the device mesh.

The mesh has the axes `data`, `fsdp` and `tensor` and is set by `jax.set_mesh`; without a mesh (on a single
device) these functions do nothing. FSDP (Zhao et al., arXiv 2304.11277) splits the hidden size D of every
weight, which pruning of heads and channels leaves unchanged; tensor parallelism (Shoeybi et al., arXiv
1909.08053) splits KV groups with their query heads, MLP channels and the vocabulary. Rows of a batch are
split over `data` and `fsdp` together.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from adapt_jax.models.errors import InputError

AXES = ('data', 'fsdp', 'tensor')
_ROWS = ('data', 'fsdp')
# B: rows of a batch, or all their tokens, rows first. C: columns of a matrix, over all devices. Other axes of
# activations, '.', are not split.
_AXIS_OF: dict[str, Any] = {
  'B': _ROWS,
  'C': AXES,
  'D': 'fsdp',
  'K': 'tensor',
  'N': 'tensor',
  'F': 'tensor',
  'V': 'tensor',
}

# Leaf -> its letters, without the leading layer axis of stacked parameters. Leaves that are not listed, and
# vectors [D], are replicated on every device.
_LEAVES = {
  'embed': 'VD', 'lm_head': 'VD', 'q': 'KGHD', 'k': 'KHD', 'v': 'KHD', 'o': 'DKGH', 'q_bias': 'KGH',
  'k_bias': 'KH', 'v_bias': 'KH', 'gate': 'FD', 'up': 'FD', 'down': 'DF',
  'k_cache': 'BK..', 'v_cache': 'BK..', 'hidden': 'B..',
}  # fmt: skip


def mesh() -> Any:
  """The current mesh, or None; for use outside jitted functions. Raises InputError for other axes."""
  found = jax.sharding.get_mesh()
  if found.empty:
    return None
  if set(found.axis_names) != set(AXES) or not found.are_all_axes_auto:
    raise InputError(
      f'the mesh has the axes {found.axis_names} of types {tuple(map(str, found.axis_types))}: make it by '
      f'jax.make_mesh((data, fsdp, tensor), {AXES}, axis_types=3 * (jax.sharding.AxisType.Auto,))'
    )
  return found


def device_count() -> int:
  """The number of devices of the current mesh; 1 without a mesh."""
  return _size(AXES)


def row_shards() -> int:
  """The number of shards into which the rows of a batch are split."""
  return _size(_ROWS)


def token_shards(tokens: int) -> int:
  """The number of equal shards of that many tokens, rows first: 1 if the devices cannot split them."""
  return row_shards() if tokens % row_shards() == 0 else 1


def row_sharding() -> NamedSharding | None:
  """Sharding of arrays whose first axis is the rows of a batch; None without a mesh."""
  found = mesh()
  return found and NamedSharding(found, PartitionSpec(_ROWS))


def constrain(x: jax.Array, letters: str) -> jax.Array:
  """Splits `x` as `letters` specify, inside a jitted function; an axis that cannot be split is replicated."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(letters, x.shape))


def constrain_params(tree: Any) -> Any:
  """Splits a tree of parameters or gradients as `shardings` specifies, inside a jitted function."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, jax.tree_util.tree_map_with_path(_leaf_spec, tree))


def divides(letters: str, shape: tuple[int, ...]) -> bool:
  """Whether the current mesh divides all axes of such an array that it should split."""
  return all(size % _size(_AXIS_OF.get(letter)) == 0 for letter, size in zip(letters, shape, strict=True))


def on_each_device(
  fn: Callable[..., jax.Array], letters: tuple[str, ...], *args: jax.Array | None
) -> jax.Array:
  """`fn` of each device's own part of the arguments, split as `letters` specify, inside a jitted function.

  The result is split like the first argument. For kernels, which the compiler cannot split by itself.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return fn(*args)
  specs = tuple(PartitionSpec(*(_AXIS_OF.get(letter) for letter in axes)) for axes in letters)
  return jax.shard_map(fn, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)


def gather_no_earlier(layer: Any, x: jax.Array) -> tuple[Any, jax.Array]:
  """Returns both unchanged, but the layer's weights are not gathered before `x` has been computed.

  In the backward pass, x's gradient is not passed on before the layer's gradient is split. Otherwise the
  compiler may gather all layers at the start, or keep all their gradients unsplit until the end.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return layer, x
  layer, x = jax.lax.optimization_barrier((layer, x))
  return constrain_params(layer), x


def gathered(tree: Any) -> Any:
  """The parameters with all of D on each device, inside a jitted function.

  For weights that a loop over micro-batches uses: otherwise each of its rounds may gather them.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return tree

  def whole(path: Any, leaf: Any) -> PartitionSpec:
    return PartitionSpec(*(None if axis == _AXIS_OF['D'] else axis for axis in _leaf_spec(path, leaf)))

  return jax.lax.with_sharding_constraint(tree, jax.tree_util.tree_map_with_path(whole, tree))


def shardings(tree: Any) -> Any:
  """A NamedSharding for every leaf of a pytree, by its name; None if no mesh is set.

  The tree may hold parameters, stacked or not, optimizer moments, gradients, or anything with the same leaf
  names; other leaves are replicated. So is a vocabulary that the `tensor` axis does not divide.
  """
  if (found := mesh()) is None:
    return None
  specs = jax.tree_util.tree_map_with_path(_leaf_spec, tree)
  return jax.tree.map(lambda spec: NamedSharding(found, spec), specs)


def placed(tree: Any) -> Any:
  """Adds the leaves' shardings to a tree of `jax.ShapeDtypeStruct`, if a mesh is set."""
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
