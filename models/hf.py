"""Hugging Face weights in and out, tensor by tensor.

One table of rules serves both directions. Our arrays keep Hugging Face's element order, so every
transform is a reshape and a dense round trip gives the same bits.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.errors import InputError, first_line
from models.files import exists, write_text
from models.llama import Params, abstract_params

_DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # of safetensors -> of numpy
INDEX_NAME = 'model.safetensors.index.json'


class Rule(NamedTuple):
  """One tensor: its Hugging Face name, its path in our pytree, and how its axes fold to HF's.

  The first `rows` axes fold into HF's first axis, the others into its second; None is a vector.
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
  Rule('post_attention_layernorm.weight', ('mlp_norm',), None),
  Rule('mlp.gate_proj.weight', ('mlp', 'gate'), 1),
  Rule('mlp.up_proj.weight', ('mlp', 'up'), 1),
  Rule('mlp.down_proj.weight', ('mlp', 'down'), 1),
  Rule('mlp.down_proj.bias', ('mlp', 'down_bias'), None),
)
_TOP_RULES = (
  Rule('model.embed_tokens.weight', ('embed',), 1),
  Rule('model.norm.weight', ('norm',), None),
  Rule('lm_head.weight', ('lm_head',), 1),
)


class Leaf(NamedTuple):
  """One expected tensor: HF name, HF shape, path (with the layer's index), shape in our pytree."""

  name: str
  hf_shape: tuple[int, ...]
  path: tuple[str | int, ...]
  shape: tuple[int, ...]


def _lookup(tree: Any, path: tuple[str | int, ...]) -> Any:
  for key in path:
    if isinstance(tree, dict) and key not in tree:
      return None
    tree = tree[key]
  return tree


def _hf_shape(shape: tuple[int, ...], rows: int | None) -> tuple[int, ...]:
  if rows is None:
    return (math.prod(shape),)
  return (math.prod(shape[:rows]), math.prod(shape[rows:]))


@functools.lru_cache(maxsize=16)
def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
  """Every stored tensor of the model, in file order."""
  tree = abstract_params(config)
  found = []

  def add(rule: Rule, name: str, path: tuple[str | int, ...]) -> None:
    if (leaf := _lookup(tree, path)) is not None:
      found.append(Leaf(name, _hf_shape(leaf.shape, rule.rows), path, leaf.shape))

  add(_TOP_RULES[0], _TOP_RULES[0].name, _TOP_RULES[0].path)
  for i in range(config.num_layers):
    for rule in _LAYER_RULES:
      add(rule, f'model.layers.{i}.{rule.name}', ('layers', i, *rule.path))
  for rule in _TOP_RULES[1:]:
    add(rule, rule.name, rule.path)
  return tuple(found)


class TensorReader(Protocol):
  """Tensors by Hugging Face name, read one at a time; `shape` and `dtype` need the headers only."""

  where: str

  def names(self) -> set[str]: ...
  def shape(self, name: str) -> tuple[int, ...]: ...
  def dtype(self, name: str) -> str: ...
  def read(self, name: str) -> np.ndarray: ...


class SafetensorsReader:
  """The `.safetensors` files of a directory, single or sharded."""

  def __init__(self, directory: str | pathlib.Path):
    self.where = str(directory)
    directory = pathlib.Path(directory)
    index, single = directory / INDEX_NAME, directory / 'model.safetensors'
    if exists(index):
      weight_map = read_json(index).get('weight_map')
      if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f'{index}: has no weight_map of tensors to files: download it again')
      files = sorted(set(weight_map.values()))
    elif exists(single):
      weight_map, files = None, [single.name]
    else:
      raise InputError(
        f'{directory}: no model.safetensors or {INDEX_NAME} here; other weight formats run code or '
        f'are not supported: convert the checkpoint to safetensors'
      )
    self._file_of: dict[str, Any] = {}
    for name in files:
      if not exists(directory / name):
        raise InputError(f'{index}: lists {name}, which is absent: download the checkpoint again')
      try:
        handle = safe_open(directory / name, framework='np')
      except OSError as error:
        raise InputError(f'{directory / name}: cannot be read ({first_line(error)})') from None
      except SafetensorError as error:
        raise InputError(
          f'{directory / name}: corrupt or truncated safetensors ({error}): download it again'
        ) from None
      self._file_of |= dict.fromkeys(handle.keys(), handle)
    if absent := sorted(set(weight_map or ()) - set(self._file_of)):
      raise InputError(f'{index}: lists {absent[0]}, which is in none of its files')

  def names(self) -> set[str]:
    return set(self._file_of)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._file_of[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """Numpy name of the stored dtype; InputError if it is not supported."""
    code = self._file_of[name].get_slice(name).get_dtype()
    if code not in _DTYPES:
      raise InputError(
        f'{self.where}: tensor {name} has dtype {code}, which is not supported: convert the checkpoint '
        f'to one of {", ".join(_DTYPES)}'
      )
    return _DTYPES[code]

  def read(self, name: str) -> np.ndarray:
    return self._file_of[name].get_tensor(name)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; InputError naming the file if it cannot be read or holds none."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}): check the file') from None
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path}: not valid JSON ({first_line(error)}): download it again') from None
  if not isinstance(found, dict):
    raise InputError(f'{path}: holds {type(found).__name__}, not an object: download it again')
  return found


def check_tensors(config: ModelConfig, reader: TensorReader) -> None:
  """Raises InputError naming the first tensor that is missing, extra, mis-shaped or of an unsupported dtype.

  Reads headers only.
  """
  expected = {leaf.name: leaf for leaf in leaves(config)}
  ignored = {'lm_head.weight'} if config.tie_embeddings else set()
  found = {
    n for n in reader.names() - ignored if not n.endswith('rotary_emb.inv_freq')
  }  # LLaMA 1 and 2 files may store that buffer
  for problem, names in (('is missing', expected.keys() - found), ('is extra', found - expected.keys())):
    if names:
      more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
      raise InputError(
        f'{reader.where}: tensor {min(names)} {problem}{more}: config.json and weights do not agree'
      )
  for name, leaf in expected.items():
    if reader.shape(name) != leaf.hf_shape:
      raise InputError(
        f'{reader.where}: tensor {name} has shape {list(reader.shape(name))}, config.json asks for '
        f'{list(leaf.hf_shape)}'
      )
    reader.dtype(name)  # raises if it is not supported


def load_params(config: ModelConfig, reader: TensorReader, dtype: Any = None) -> Params:
  """Reads all parameters, one tensor at a time; `dtype` None keeps the stored one.

  Raises InputError naming a tensor that `check_tensors` refuses or that cannot be read.
  """
  check_tensors(config, reader)

  def load(leaf: Leaf) -> jax.Array:
    try:
      tensor = reader.read(leaf.name)
    except (SafetensorError, OSError) as error:
      raise InputError(f'{reader.where}: tensor {leaf.name} cannot be read ({first_line(error)})') from None
    array = jax.numpy.asarray(tensor if dtype is None else tensor.astype(dtype, copy=False))
    return array.reshape(leaf.shape)

  return _tree(config, load)


def abstract_stored_params(config: ModelConfig, reader: TensorReader, dtype: Any = None) -> Params:
  """The tree of `jax.ShapeDtypeStruct` that `load_params` would give; reads headers only."""

  def describe(leaf: Leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(reader.dtype(leaf.name) if dtype is None else dtype))

  return _tree(config, describe)


def _tree(config: ModelConfig, make: Callable[[Leaf], Any]) -> Params:
  params: Params = {'layers': [{'attention': {}, 'mlp': {}} for _ in config.layers]}
  for leaf in leaves(config):
    _lookup(params, leaf.path[:-1])[leaf.path[-1]] = make(leaf)
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
  directory: pathlib.Path,
  dtype: Any = None,
  shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes safetensors into an existing directory, materialising one shard at a time.

  `dtype` None keeps each array's own. One file up to `shard_bytes`, else shards and an index.
  """
  by_name = {leaf.name: leaf for leaf in leaves(config)}
  arrays = {name: _lookup(params, leaf.path) for name, leaf in by_name.items()}
  sizes = {n: a.size * np.dtype(dtype or a.dtype).itemsize for n, a in arrays.items()}
  shards = _plan_shards(sizes, shard_bytes)
  weight_map = {}
  for k, names in enumerate(shards):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{k + 1:05d}-of-{len(shards):05d}.safetensors'
    tensors = {}
    for name in names:
      array = np.asarray(arrays[name]).reshape(by_name[name].hf_shape)
      # safetensors writes the wrong bytes, silently, for an array that is not contiguous.
      tensors[name] = np.ascontiguousarray(array, dtype=dtype)
      weight_map[name] = file
    save_file(tensors, directory / file, metadata={'format': 'pt'})
  if len(shards) > 1:
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + '\n')
