"""Checks an exported model against the one in memory: equal weights, or equal predictions on a few texts."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.machine.mesh import put_rows
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.gguf_model import STORED_DTYPES
from adapt_jax.models.formats.hf_weights import TensorReader, host_tensors
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import row_shards, shardings

_TEXTS = (
  'The quick brown fox jumps over the lazy dog.',
  'In 1947 the committee met 12 times; its report, printed the year after, was never read aloud.',
  'def mean(values):\n  return sum(values) / len(values)\n',
  'Naïve façades of Köln, 東京 and Москва cost €1,250.75 – or more 😀.',
)
_LENGTH = 64  # tokens of a text, at most
# RMS of the logit differences over RMS of the logits. A larger difference than rounding explains is an export
# error; blocks of 8 to 4 bits lose more, especially in small models.
_LIMIT = 1e-3
_LIMITS = {'Q8_0': 0.1, 'Q6_K': 0.4, 'Q5_K_M': 0.6, 'Q4_K_M': 0.7, 'Q4_0': 0.7}
_CHUNK = 1 << 22  # elements that are compared at once
# GGUF types of matrices; vectors are F32 in every such file.
_DTYPES: dict[str | None, Any] = {kind.name: dtype for kind, dtype in STORED_DTYPES.items()}


def check(
  config: ModelConfig, params: Params, path: pathlib.Path, tokenizer: Any, kind: str | None
) -> dict[str, float]:
  """Reads back `path`, a directory or .gguf file, and compares its weights or, if these differ, logits.

  kind: the dtype, or the GGUF type, that the weights were written in; None for each tensor's own.

  Returns the largest `logit_difference`, rounding to the written dtype included, and the share of positions
  at which both predict the `same_token` as the most likely one.
  Raises InputError if the tokenizer or the function differs. With several processes, all must call it.
  """
  source = open_source(str(path))
  tokens, counted = _rows(tokenizer)
  same_ids = tokenizer is None or _encode(source.load_tokenizer()) == _encode(tokenizer)
  if (
    same_ids
    and jax.process_count() == 1
    and source.config == config
    and _same_weights(config, params, source.reader)
  ):
    return {'logit_difference': 0.0, 'same_token': 1.0}  # the same function
  params = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), params)
  reloaded = source.load_params(None, shardings(source.abstract_params()))
  batch = put_rows(np.arange(len(tokens)), lambda ids: (tokens[ids], counted[ids]))
  with jax.default_matmul_precision('highest'):
    # One at a time: one program would hold the activations and converted weights of all.
    predict = jax.jit(_logits, static_argnums=(0, 3))
    given_BTV = predict(config, params, batch[0])
    rounded_BTV = given_BTV if kind is None else predict(config, params, batch[0], kind)
    found_BTV = predict(source.config, reloaded, batch[0])
  largest, error, same = (float(x) for x in jax.jit(_compare)(given_BTV, rounded_BTV, found_BTV, batch[1]))
  limit = _LIMITS.get(kind or '', _LIMIT)
  if not (same_ids and error <= limit):
    raise InputError(
      f'{path}: read back, its logits have a relative error of {error:.2g} (at most {limit:g} is allowed) '
      f'and its tokenizer gives {"the same" if same_ids else "other"} ids: the export was discarded; please '
      f'report this with the command'
    )
  return {'logit_difference': largest, 'same_token': same}


def _same_weights(config: ModelConfig, params: Params, reader: TensorReader) -> bool:
  """Whether every tensor, read back, has the original's numbers, such as bf16 of equal fp32."""
  return all(_equal(tensor, reader.read(leaf.name)) for leaf, tensor in host_tensors(config, params))


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether a and b are equal in fp32 and finite; others are compared by logits, which then fail."""

  def same(part: slice) -> bool:
    x, y = (of.reshape(-1)[part].astype(np.float32) for of in (a, b))
    return np.array_equal(x.view(np.uint32), y.view(np.uint32)) and bool(np.isfinite(x).all())

  return all(same(slice(i, i + _CHUNK)) for i in range(0, a.size, _CHUNK))


def _encode(tokenizer: Any) -> list[list[int]]:
  return [tokenizer(text)['input_ids'][:_LENGTH] for text in _TEXTS]


def _rows(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
  """The texts' tokens [N, T] and a mask of those that count; N is a multiple of `row_shards()`."""
  ids = _encode(tokenizer) if tokenizer is not None else [list(range(16))]
  count = row_shards() * -(-len(ids) // row_shards())
  tokens = np.zeros((count, max(map(len, ids))), np.int32)
  counted = np.zeros(tokens.shape, bool)
  for row in range(count):
    found = ids[row % len(ids)]
    tokens[row, : len(found)], counted[row, : len(found)] = found, True
  return tokens, counted


def _logits(config: ModelConfig, params: Params, tokens_BT: jax.Array, kind: str | None = None) -> jax.Array:
  """Logits of parameters rounded as in `kind`; quantised types, which have wider limits, are not rounded."""

  def rounded(path: Any, x: jax.Array) -> jax.Array:
    vector = 'norm' in path[-1].key or 'bias' in path[-1].key
    dtype = jnp.dtype(_DTYPES.get(kind, kind))
    return x if vector and kind in _DTYPES else x.astype(dtype).astype(x.dtype)

  if kind and kind not in _LIMITS:
    params = jax.tree_util.tree_map_with_path(rounded, params)
  return llama.apply(config, params, tokens_BT)


def _compare(
  given_BTV: jax.Array, rounded_BTV: jax.Array, found_BTV: jax.Array, counted_BT: jax.Array
) -> tuple[jax.Array, ...]:
  """Largest difference to the given logits, RMS difference to the rounded ones, share of equal tokens."""
  mask = counted_BT[..., None]
  largest = jnp.max(jnp.where(mask, jnp.abs(found_BTV - given_BTV), 0))
  squared = [jnp.sum(jnp.where(mask, jnp.square(x), 0)) for x in (found_BTV - rounded_BTV, rounded_BTV)]
  same_BT = (found_BTV.argmax(-1) == given_BTV.argmax(-1)) & counted_BT
  return largest, jnp.sqrt(squared[0] / squared[1]), same_BT.sum() / counted_BT.sum()
