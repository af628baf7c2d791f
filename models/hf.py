"""Hugging Face weights in and out, tensor by tensor.

One table of rules serves both directions. Our arrays keep Hugging Face's element order, so every
transform is a reshape and a dense round trip gives the same bits.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.config import ModelConfig
from models.errors import InputError
from models.files import write_text
from models.llama import Params, abstract_params

_FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
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
  Rule('self_attn.q_norm.weight', ('attention', 'q_norm'), None),
  Rule('self_attn.k_norm.weight', ('attention', 'k_norm'), None),
  Rule('post_attention_layernorm.weight', ('mlp_norm',), None),
  Rule('mlp.gate_proj.weight', ('mlp', 'gate'), 1),
  Rule('mlp.up_proj.weight', ('mlp', 'up'), 1),
  Rule('mlp.down_proj.weight', ('mlp', 'down'), 1),
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


def leaves(config: ModelConfig) -> list[Leaf]:
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
  return found


class TensorReader(Protocol):
  """Tensors by Hugging Face name, read one at a time."""

  where: str

  def names(self) -> set[str]: ...
  def shape(self, name: str) -> tuple[int, ...]: ...
  def read(self, name: str) -> np.ndarray: ...
  def dtype(self) -> str: ...


class SafetensorsReader:
  """The `.safetensors` files of a directory, single or sharded."""

  def __init__(self, directory: str | pathlib.Path):
    self.where = str(directory)
    directory = pathlib.Path(directory)
    index, single = directory / INDEX_NAME, directory / 'model.safetensors'
    if index.exists():
      weight_map = read_json(index).get('weight_map')
      if not isinstance(weight_map, dict):
        raise InputError(f'{index}: has no weight_map: download it again')
      files = sorted(set(weight_map.values()))
    elif single.exists():
      weight_map, files = None, [single.name]
    else:
      raise InputError(
        f'{directory}: no model.safetensors or {INDEX_NAME} here; other weight formats run code or '
        f'are not supported: convert the checkpoint to safetensors'
      )
    self._file_of: dict[str, Any] = {}
    for name in files:
      if not (directory / name).exists():
        raise InputError(f'{index}: lists {name}, which is absent: download the checkpoint again')
      try:
        handle = safe_open(directory / name, framework='np')
      except (SafetensorError, OSError) as error:
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

  def read(self, name: str) -> np.ndarray:
    return self._file_of[name].get_tensor(name)

  def dtype(self) -> str:
    """Numpy name of the largest tensor's dtype, taken from the headers."""
    largest = max(sorted(self._file_of), key=lambda n: math.prod(self.shape(n)))
    code = self._file_of[largest].get_slice(largest).get_dtype()
    return {'BF16': 'bfloat16', 'F16': 'float16'}.get(code, 'float32')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file of a checkpoint; InputError naming the file if it is none."""
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f'{path}: not valid JSON ({error}): download it again') from None
  if not isinstance(found, dict):
    raise InputError(f'{path}: holds {type(found).__name__}, not an object: download it again')
  return found


def check_tensors(config: ModelConfig, reader: TensorReader) -> None:
  """Raises InputError naming the first missing, extra or mis-shaped tensor; reads headers only."""
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


def load_params(config: ModelConfig, reader: TensorReader, dtype: Any = None) -> Params:
  """Reads all parameters, one tensor at a time; `dtype` None keeps the stored one.

  Raises InputError naming a missing, extra, mis-shaped, unreadable or non-float tensor.
  """
  check_tensors(config, reader)
  params: Params = {'layers': [{'attention': {}, 'mlp': {}} for _ in config.layers]}
  for leaf in leaves(config):
    try:
      tensor = reader.read(leaf.name)
    except (SafetensorError, OSError) as error:
      raise InputError(f'{reader.where}: tensor {leaf.name} cannot be read ({error})') from None
    if tensor.dtype not in _FLOATS:
      raise InputError(
        f'{reader.where}: tensor {leaf.name} has dtype {tensor.dtype}: only float32, float16 and '
        f'bfloat16 weights are supported'
      )
    array = jax.numpy.asarray(tensor if dtype is None else tensor.astype(dtype, copy=False))
    _lookup(params, leaf.path[:-1])[leaf.path[-1]] = array.reshape(leaf.shape)
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
