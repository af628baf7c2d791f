"""Arguments of the library (`adapt_jax.api`), turned into the options and texts of the command."""

import os
from collections.abc import Collection, Sequence
from typing import Any, TypeGuard

import jax
import numpy as np

from adapt_jax.config.build import flatten, from_dict
from adapt_jax.config.options import RunOptions
from adapt_jax.data.train_set import BlockRows, TrainSet
from adapt_jax.data.windows import Blocks, check_vocab
from adapt_jax.machine import mesh
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.pipeline.loader import Loader
from adapt_jax.pruning import serving_widths, slicegpt
from adapt_jax.pruning.criteria import Importance
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.methods.base import Method

Text = str | os.PathLike[str] | Sequence[str] | np.ndarray | jax.Array
# Options of the command that have no effect in the library; docs/library.md says what to do instead.
_NOT_IN_PRUNE = ('stages', 'stage_targets', 'calibration')
_NOT_IN_RECOVER = ('source', 'save_every', 'distill.cache', 'distill.source')


def check_model(config: ModelConfig) -> None:
  """Raises InputError for a model that cannot be pruned or trained, or that the current mesh cannot split."""
  if config.sliced_from:
    raise InputError('the model is sliced by SliceGPT and cannot be pruned or trained')
  mesh.check_model(config)


def check_tokenizer(tokenizer: Any) -> None:
  """Raises InputError without a tokenizer."""
  if tokenizer is None:
    raise InputError('the model has no tokenizer: give token ids, or a Model with a tokenizer')


def _check_named(group: str, named: dict[str, Any], without: Collection[str]) -> None:
  """Raises InputError for options that would have no effect."""
  if wrong := [name for name in without if name in named or name in flatten(named)]:
    raise InputError(f'{group}.{wrong[0]} is an option of the command alone: see docs/library.md')


def prune_options(named: dict[str, Any], tokens: np.ndarray, config: ModelConfig, seed: int) -> RunOptions:
  """Options with these values of `prune`, for these rows; aligned for `serve` and the mesh."""
  _check_named('prune', named, _NOT_IN_PRUNE)
  calibration = {'samples': len(tokens), 'length': tokens.shape[1]}
  options = serving_widths.aligned(from_dict({'seed': seed, 'prune': named | {'calibration': calibration}}))
  if options.prune.method == slicegpt.METHOD:
    raise InputError(f'prune.method = {slicegpt.METHOD!r} is for the command alone: choose another')
  serving_widths.check_model(options.prune, config)
  return options


def pruning_method(
  name: str, method: str | type[Method], importance: str | Importance
) -> type[Method] | None:
  """The class, if it is not the one of this name: a user's class, or one with another importance."""
  given = None if isinstance(method, str) else method
  base = given or METHODS[name]
  if importance and base.importance:
    raise InputError(
      f'importance: {base.__name__} has its own: leave it out, or choose the method adapt or uniform'
    )
  return given if isinstance(importance, str) else type(base.__name__, (base,), {'importance': importance})


def train_options(text: Text, named: dict[str, Any], distils: bool, **others: Any) -> RunOptions:
  """Options with these values of `train`; `distils`: whether there is a teacher."""
  _check_named('train', named, _NOT_IN_RECOVER)
  given = {'save_every': 10**9, **named}
  if is_ids(text):
    given['length'] = row_length(text, named.get('length'))
  else:
    given['source'] = entries(text)
  given['distill'] = ({} if distils else {'alpha': 0.0}) | named.get('distill', {})
  options = from_dict({'train': given, **others})
  train = options.train
  if train.distill.alpha and not distils:
    raise InputError(f'train.distill.alpha = {train.distill.alpha} needs a teacher: pass a Model as teacher=')
  if train.tokens < (least := train.batch * train.length):
    raise InputError(f'train.tokens = {train.tokens:,} is less than one batch of {least:,}: raise it')
  mesh.check_rows('train.batch', train.batch)
  return options


def is_ids(text: Text) -> TypeGuard[np.ndarray | jax.Array]:
  return isinstance(text, (np.ndarray, jax.Array))


def calibration_rows(rows: Any, config: ModelConfig) -> np.ndarray:
  """Token ids [S, T] of calibration rows, which the devices of the mesh can split."""
  tokens = token_ids(rows, config, 'rows')
  mesh.check_rows('rows', len(tokens))
  return tokens


def entries(text: Any) -> tuple[str, ...]:
  """The entries of a source, such as several files."""
  return tuple(map(os.fspath, [text] if isinstance(text, (str, os.PathLike)) else text))


def row_length(text: Text, length: int | None) -> int:
  """The length of rows of a text. Raises InputError for another one than that of ids."""
  if not is_ids(text):
    return 1024 if length is None else length
  if length not in (None, text.shape[-1]):
    raise InputError(f'length = {length}, but the rows of text have {text.shape[-1]} ids: leave it out')
  return int(text.shape[-1])


def token_ids(tokens: Any, config: ModelConfig, name: str) -> np.ndarray:
  """Token ids int32 [N, T]. Raises InputError for anything else, naming the argument."""
  ids = np.asarray(tokens)
  whole = np.issubdtype(ids.dtype, np.integer)
  if ids.ndim != 2 or not whole or ids.size == 0 or ids.shape[1] < 2 or ids.min() < 0:
    raise InputError(f'{name}: {ids.dtype} of shape {list(ids.shape)}: give token ids [N, T], from 0')
  check_vocab(int(ids.max()), config.vocab_size, name)
  return ids.astype(np.int32)


def blocks(text: Text, options: RunOptions, model: Any, length: int, most: int) -> Blocks:
  """Windows of the first `most` tokens of a text, or the given rows."""
  if is_ids(text):
    ids = token_ids(text, model.config, 'text')
    targets = np.ones(ids.shape, bool)
    targets[:, 0] = False
    return Blocks(ids, targets, 0)
  check_tokenizer(model.tokenizer)
  return Loader(options, model, model.tokenizer).load('text', entries(text), length, most)


def train_set(text: Text, options: RunOptions, model: Any) -> TrainSet:
  """The rows of training of a text, or the given rows."""
  if is_ids(text):
    rows = BlockRows(token_ids(text, model.config, 'text'), model.config.vocab_size, 'text')
    train = options.train
    return TrainSet([rows], [1.0], length=train.length, batch=train.batch, seed=options.seed)
  check_tokenizer(model.tokenizer)
  return Loader(options, model, model.tokenizer).train_set()
