"""Reads and writes Hugging Face weights, tensor by tensor.

One table of rules is used in both directions. Our arrays keep Hugging Face's element order, so every
transform is a reshape and a dense round trip gives the same bits.
"""

import functools
import gc
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import reading
from adapt_jax.models.files import write_text
from adapt_jax.models.formats.safetensors import INDEX_NAME, write_tensors
from adapt_jax.models.network.llama import Params, abstract_params

_TAKEN_OVER = 64  # JAX uses memory aligned to this on a CPU device without a copy


class Rule(NamedTuple):
  """One tensor: its Hugging Face name, its path in our pytree, and how its axes fold into HF's.

  The first `rows` axes fold into HF's first axis, the others into its second; None for a vector.
  """

  name: str
  path: tuple[str, ...]
  rows: int | None


_LAYER_RULES = (
  Rule('input_layernorm.weight', ('attention_norm',), None),
  Rule('self_attn.q_proj.weight', ('attention', 'q'), 3),
  Rule('self_attn.k_proj.weight', ('attention', 'k'), 2),
  Rule('self_attn.v_proj.weight', ('attention', 'v'), 2),
  Rule('self_attn.o_proj.weight', ('attention', 'o'), 1),
  Rule('self_attn.q_proj.bias', ('attention', 'q_bias'), None),
  Rule('self_attn.k_proj.bias', ('attention', 'k_bias'), None),
  Rule('self_attn.v_proj.bias', ('attention', 'v_bias'), None),
  Rule('self_attn.o_proj.bias', ('attention', 'o_bias'), None),
  Rule('self_attn.q_norm.weight', ('attention', 'q_norm'), None),
  Rule('self_attn.k_norm.weight', ('attention', 'k_norm'), None),
  Rule('post_attention_layernorm.weight', ('attention_post_norm',), None),
  Rule('', ('mlp_norm',), None),  # see `Family.mlp_norm`
  Rule('mlp.gate_proj.weight', ('mlp', 'gate'), 1),
  Rule('mlp.up_proj.weight', ('mlp', 'up'), 1),
  Rule('mlp.down_proj.weight', ('mlp', 'down'), 1),
  Rule('mlp.down_proj.bias', ('mlp', 'down_bias'), None),
  Rule('post_feedforward_layernorm.weight', ('mlp_post_norm',), None),
  Rule('attention_shortcut.weight', ('attention_shortcut',), 1),
  Rule('mlp_shortcut.weight', ('mlp_shortcut',), 1),
)
_TOP_RULES = (
  Rule('model.embed_tokens.weight', ('embed',), 1),
  Rule('model.norm.weight', ('norm',), None),
  Rule('model.norm.rotation.weight', ('head_rotation',), 1),
  Rule('lm_head.weight', ('lm_head',), 1),
)


class Leaf(NamedTuple):
  """One expected tensor: HF name, HF shape, path (with the layer's index), shape in our pytree.

  `folds` has, for each HF axis, the first of our axes that fold into it and the one after the last.
  """

  name: str
  hf_shape: tuple[int, ...]
  path: tuple[str | int, ...]
  shape: tuple[int, ...]
  folds: tuple[tuple[int, int], ...]

  def hf_index(self, bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    """The index in the HF tensor of our part `bounds`, with start and stop on each axis.

    Only the first of the axes that fold together may be split: ValueError for another.
    """
    index = []
    for first, end in self.folds:
      if bounds[first + 1 : end] != tuple((0, size) for size in self.shape[first + 1 : end]):
        raise ValueError(f'{self.name}: {bounds} of {self.shape} is no block of rows and columns')
      inner = math.prod(self.shape[first + 1 : end])
      index.append(slice(*(inner * at for at in bounds[first])))
    return tuple(index)


def lookup(tree: Any, path: tuple[str | int, ...]) -> Any:
  """The leaf, or subtree, at a path; None if a key is absent."""
  for key in path:
    if isinstance(tree, dict) and key not in tree:
      return None
    tree = tree[key]
  return tree


@functools.lru_cache(maxsize=16)
def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
  """Every stored tensor of the model, in file order."""
  tree = abstract_params(config)
  found = []

  def add(rule: Rule, name: str, path: tuple[str | int, ...]) -> None:
    if (leaf := lookup(tree, path)) is not None:
      rank = len(leaf.shape)
      folds = ((0, rank),) if rule.rows is None else ((0, rule.rows), (rule.rows, rank))
      hf_shape = tuple(math.prod(leaf.shape[first:end]) for first, end in folds)
      found.append(Leaf(name, hf_shape, path, leaf.shape, folds))

  add(_TOP_RULES[0], _TOP_RULES[0].name, _TOP_RULES[0].path)
  for i in range(config.num_layers):
    for rule in _LAYER_RULES:
      name = rule.name or f'{config.traits.mlp_norm}.weight'
      add(rule, f'model.layers.{i}.{name}', ('layers', i, *rule.path))
  for rule in _TOP_RULES[1:]:
    add(rule, rule.name, rule.path)
  return tuple(found)


def stored_leaves(config: ModelConfig) -> dict[str, list[Leaf]]:
  """The tensors of a Hugging Face file in order, and the leaves whose rows each holds, one after another."""
  fused = {part: name for name, parts in config.traits.fused.items() for part in parts}
  found: dict[str, list[Leaf]] = {}
  for leaf in leaves(config):
    *layer, part = leaf.name.removesuffix('.weight').split('.', 3) if leaf.path[0] == 'layers' else ('',)
    name = '.'.join([*layer, fused[part], 'weight']) if part in fused else leaf.name
    found.setdefault(name, []).append(leaf)
  return found


class TensorReader(Protocol):
  """Tensors by Hugging Face name, read one at a time, whole or the part at an index of slices.

  `shape` and `dtype` need the headers only. `files` hold the tensors. `read` may return mapped pages of a
  file, which must not be written to.
  """

  where: str
  files: list[pathlib.Path]

  def names(self) -> set[str]: ...
  def shape(self, name: str) -> tuple[int, ...]: ...
  def dtype(self, name: str) -> str: ...
  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


def check_tensors(config: ModelConfig, reader: TensorReader) -> None:
  """Raises InputError naming the first tensor that is missing, extra, mis-shaped or of an unsupported dtype.

  Reads headers only.
  """
  expected = {leaf.name: leaf for leaf in leaves(config)}
  ignored = {'lm_head.weight'} if config.tie_embeddings else set()
  # LLaMA 1 and 2 files may store that buffer.
  stored = {name for name in reader.names() - ignored if not name.endswith('rotary_emb.inv_freq')}
  with reading('', reader.where, 'configuration and weights do not match'):
    for problem, names in (('missing', expected.keys() - stored), ('extra', stored - expected.keys())):
      if names:
        more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
        raise ValueError(f'tensor {min(names)} is {problem}{more}')
    for name, leaf in expected.items():
      if reader.shape(name) != leaf.hf_shape:
        raise ValueError(f'tensor {name} has shape {list(reader.shape(name))}, not {list(leaf.hf_shape)}')
      reader.dtype(name)  # raises if it is not supported


def load_params(
  config: ModelConfig, reader: TensorReader, dtype: Any = None, shardings: Any = None
) -> Params:
  """Reads all parameters, one tensor at a time; `dtype` None keeps the stored one.

  With `shardings`, a tree of jax.sharding.Sharding like the parameters, this process reads the slices
  of its own devices, each once. The host then never holds more than its part of one tensor.

  Raises InputError naming a tensor that `check_tensors` refuses or that cannot be read.
  """
  check_tensors(config, reader)

  def load(leaf: Leaf) -> jax.Array:
    read: dict[Any, np.ndarray] = {}  # devices may hold the same slice

    def part(index: Any) -> np.ndarray:
      bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
      if bounds not in read:
        read[bounds] = _for_device(_read(reader, leaf, bounds), dtype)
      return read[bounds]

    if shardings is None:
      array = jax.device_put(part((slice(None),) * len(leaf.shape)))
    else:
      array = jax.make_array_from_callback(leaf.shape, lookup(shardings, leaf.path), part)
    # JAX keeps the host array until Python's next garbage collection: free it before the next read.
    array.block_until_ready()
    gc.collect(0)
    return array

  return _tree(config, load)


class StoredTensor:
  """A parameter that is read from its file each time it is converted to numpy, as by `np.asarray`."""

  def __init__(self, reader: TensorReader, leaf: Leaf):
    self._reader, self._leaf = reader, leaf
    self.shape, self.dtype = leaf.shape, np.dtype(reader.dtype(leaf.name))

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    found = _read(self._reader, self._leaf, tuple((0, size) for size in self.shape))
    return np.array(found, dtype, copy=copy)


def stored_params(config: ModelConfig, reader: TensorReader) -> Params:
  """All parameters as `StoredTensor`, for functions that use one at a time: `save_params` and `host_tensors`.

  Raises InputError as `load_params` does.
  """
  check_tensors(config, reader)
  return _tree(config, lambda leaf: StoredTensor(reader, leaf))


def _read(reader: TensorReader, leaf: Leaf, bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
  index = leaf.hf_index(bounds)
  with reading(f'tensor {leaf.name}', reader.where):
    tensor = reader.read(leaf.name, index)
  return tensor.reshape([stop - start for start, stop in bounds])


def _for_device(tensor: np.ndarray, dtype: Any) -> np.ndarray:
  """Casts to `dtype`, and copies pages of a file, which may change, if JAX would use them without a copy."""
  tensor = tensor if dtype is None else tensor.astype(dtype, copy=False)
  pages = not tensor.flags.writeable and tensor.ctypes.data % _TAKEN_OVER == 0
  return tensor.copy() if pages else tensor


def abstract_stored_params(
  config: ModelConfig, reader: TensorReader, dtype: Any = None, shardings: Any = None
) -> Params:
  """The tree of `jax.ShapeDtypeStruct` that `load_params` would give; reads headers only."""

  def describe(leaf: Leaf) -> jax.ShapeDtypeStruct:
    stored = np.dtype(reader.dtype(leaf.name) if dtype is None else dtype)
    sharding = None if shardings is None else lookup(shardings, leaf.path)
    return jax.ShapeDtypeStruct(leaf.shape, stored, sharding=sharding)

  return _tree(config, describe)


def _tree(config: ModelConfig, make: Callable[[Leaf], Any]) -> Params:
  params: Params = {'layers': [{'attention': {}, 'mlp': {}} for _ in config.layers]}
  for leaf in leaves(config):
    lookup(params, leaf.path[:-1])[leaf.path[-1]] = make(leaf)
  return params


def _plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
  shards: list[list[str]] = [[]]
  filled = 0
  for name, size in sizes.items():
    if shards[-1] and filled + size > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  return shards


def save_params(
  config: ModelConfig,
  params: Params,
  directory: pathlib.Path | None,
  dtype: Any = None,
  shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes safetensors into an existing directory; the host holds one tensor at a time.

  `dtype` None keeps each array's own. Writes one file up to `shard_bytes`, else shards and an index.
  Parameters that are sharded over processes are gathered tensor by tensor: every process calls this;
  those that do not write pass `directory` None. Raises OSError.
  """
  parts = stored_leaves(config)
  shapes = {n: (sum(p.hf_shape[0] for p in found), *found[0].hf_shape[1:]) for n, found in parts.items()}
  dtypes = {n: np.dtype(dtype or lookup(params, found[0].path).dtype) for n, found in parts.items()}
  sizes = {n: math.prod(shape) * dtypes[n].itemsize for n, shape in shapes.items()}

  def read(name: str) -> np.ndarray:
    rows = [_on_host(lookup(params, leaf.path)).reshape(leaf.hf_shape) for leaf in parts[name]]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)

  shards = _plan_shards(sizes, shard_bytes)
  weight_map: dict[str, str] = {}
  for k, names in enumerate(shards):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{k + 1:05d}-of-{len(shards):05d}.safetensors'
    weight_map |= dict.fromkeys(names, file)
    # Wide dtypes first: all tensors are then aligned to their item size, as other programs require.
    names = sorted(names, key=lambda name: -dtypes[name].itemsize)
    if directory is not None:
      write_tensors(directory / file, {n: (shapes[n], dtypes[n]) for n in names}, read)
      continue
    for name in names:
      read(name)
  if directory is not None and len(shards) > 1:
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + '\n')


def host_tensors(config: ModelConfig, params: Params) -> Iterator[tuple[Leaf, np.ndarray]]:
  """Yields every stored tensor in file order and Hugging Face's layout, one at a time on the host.

  Every process must iterate to the end: parameters may be sharded over processes.
  """
  for leaf in leaves(config):
    yield leaf, _on_host(lookup(params, leaf.path)).reshape(leaf.hf_shape)


def _on_host(array: Any) -> np.ndarray:
  """The whole array; if it is sharded over processes, every process must call this."""
  if not isinstance(array, jax.Array):
    return np.asarray(array)
  if not array.is_fully_addressable:
    return multihost_utils.process_allgather(array, tiled=True)
  # A jax.Array caches its host copy until it is deleted: convert a temporary one instead.
  parts = [shard.data for shard in array.addressable_shards]
  return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts))
