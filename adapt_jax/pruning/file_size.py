"""The bytes of a file of weights before it is written, layer by layer: targets in MB.

A .gguf file is counted as `export.gguf` and llama.cpp's quantiser write it: vectors in F32, the output and
some layers in larger types, and rows that are no whole blocks too.
"""

import dataclasses

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.hf_weights import Leaf, leaves
from adapt_jax.pruning import budget as budgets
from adapt_jax.pruning.attention_units import KV_GROUPS, AttentionUnit
from adapt_jax.pruning.budget import Budget, LayerCost

_K_QUANTS = {'Q4_K_M': 'Q4_K', 'Q5_K_M': 'Q5_K', 'Q6_K': 'Q6_K'}
_SMALLER_BLOCKS = {'Q4_K': 'Q5_0', 'Q5_K': 'Q5_1', 'Q6_K': 'Q8_0'}  # for rows that are no whole blocks of 256
_ALIGNMENT = 32  # of each tensor in a .gguf file
_OF_TOKEN, _OF_TENSOR = 36, 60  # bytes of a .gguf header: a token with its merge, the name of a tensor
_OF_ENTRY = 110  # bytes of a safetensors header for each tensor
_MLP_AXES = {'gate': 0, 'up': 0, 'down': 1}  # leaf -> the axis along which channels lie, as stored


def hf(config: ModelConfig, itemsize: int, unit: AttentionUnit = KV_GROUPS) -> Budget:
  """Bytes of the safetensors files, of weights with this many bytes each."""
  found = budgets.memory(config, itemsize, 0, unit)
  header = _OF_ENTRY * len(leaves(config))
  return dataclasses.replace(found, kind='file', fixed=found.fixed + header, dense=found.dense + header)


def gguf(config: ModelConfig, kind: str, unit: AttentionUnit = KV_GROUPS) -> Budget:
  """Bytes of the .gguf file of a type of `GGUF_TYPES`."""
  fixed = _OF_TOKEN * config.vocab_size + _OF_TENSOR * len(leaves(config))
  of_layers: list[list[Leaf]] = [[] for _ in config.layers]
  for leaf in leaves(config):
    if leaf.path[0] == 'layers':
      of_layers[int(leaf.path[1])].append(leaf)
    else:
      fixed += int(_bytes(*leaf.hf_shape, wanted=_wanted(config, leaf, kind)))
  layers = tuple(_layer(config, i, kind, unit, of) for i, of in enumerate(of_layers))
  dense = fixed + sum(int(c.rest + c.attention[-1] + c.mlp[-1]) for c in layers)
  return Budget('file', fixed, layers, dense, removes=unit)


def _layer(config: ModelConfig, i: int, kind: str, unit: AttentionUnit, of_layer: list[Leaf]) -> LayerCost:
  shape = config.layers[i]
  most = {'attention': unit.count(shape), 'mlp': shape.ffn}
  widths = {block: np.arange(count + 1) for block, count in most.items()}
  costs, rest = {block: np.zeros(count + 1, np.int64) for block, count in most.items()}, 0
  for leaf in of_layer:
    block, name, wanted = str(leaf.path[2]), str(leaf.path[-1]), _wanted(config, leaf, kind)
    if block == 'attention' and name in unit.axes:
      axis = 1 if name == 'o' else 0
    elif block == 'mlp' and name in _MLP_AXES:
      axis = _MLP_AXES[name]
    else:
      rest += int(_bytes(*leaf.hf_shape, wanted=wanted))
      continue
    sizes = [np.full_like(widths[block], size) for size in leaf.hf_shape]
    sizes[axis] = leaf.hf_shape[axis] // most[block] * widths[block]
    costs[block] += _bytes(*sizes, wanted=wanted)
  return LayerCost(rest, costs['attention'], costs['mlp'])


def _bytes(rows: np.ndarray | int, columns: np.ndarray | int | None = None, *, wanted: str) -> np.ndarray:
  """Bytes of tensors [rows, columns], or of vectors [rows]."""
  if columns is None:
    return _padded(4 * np.asarray(rows))
  of_row = 2 * np.asarray(columns)  # F16 if no block fits
  for name in (_SMALLER_BLOCKS.get(wanted, wanted), wanted):
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    of_row = np.where(np.asarray(columns) % block == 0, np.asarray(columns) // block * size, of_row)
  return _padded(np.asarray(rows) * of_row)


def _padded(size: np.ndarray) -> np.ndarray:
  return -(-size // _ALIGNMENT) * _ALIGNMENT


def _wanted(config: ModelConfig, leaf: Leaf, kind: str) -> str:
  """The type of a matrix in a file of this kind, if its rows are whole blocks.

  For K-quants as in llama.cpp's `llama_tensor_get_type`.
  """
  if leaf.name == ('model.embed_tokens.weight' if config.tie_embeddings else 'lm_head.weight'):
    return {'Q4_0': 'Q8_0'}.get(kind, 'Q6_K' if kind in _K_QUANTS else kind)
  if kind not in _K_QUANTS:
    return kind
  if leaf.path[0] == 'layers' and leaf.path[-1] in ('v', 'down') and _is_finer(int(leaf.path[1]), config):
    return 'Q6_K'
  return _K_QUANTS[kind]


def _is_finer(i: int, config: ModelConfig) -> bool:
  """Whether v and down of layer i have six bits: in the first and last eighth, and every third between."""
  eighth = config.num_layers // 8
  return i < eighth or i >= 7 * config.num_layers // 8 or (i - eighth) % 3 == 2
