"""Arguments of the library (`adapt_jax.api`), checked and turned into the options of the command."""

import dataclasses
import functools
import inspect
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.build import declarations, from_dict
from adapt_jax.config.options import DataOptions, DistillOptions, EvaluateOptions, RunOptions, TrainOptions
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.config.values import SELF
from adapt_jax.data.train_set import ArrayRows, TrainSet, open_train_set
from adapt_jax.data.windows import Blocks, check_vocab, first_of_rows, load_blocks
from adapt_jax.machine import mesh
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import local
from adapt_jax.models.network import sharding
from adapt_jax.pruning import serving_widths, slicegpt
from adapt_jax.pruning.criteria import DISTANCES, IMPORTANCES, Importance
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.methods.base import Method

Text = str | os.PathLike[str] | Sequence[str] | np.ndarray | jax.Array
DTYPES = ('float32', 'bfloat16', 'float16')
_P = ParamSpec('_P')
_T = TypeVar('_T')
_FIELD = re.compile(r'\bconfig\.((?:\w+\.)*)(\w+)')
_NAMES = {name for field, _ in declarations() for name in field.split('.')}
# Arguments of the library that are called otherwise in the config.
_OTHER_NAMES = {
  'train.source': 'text',
  'narrow.hidden': 'hidden_size',
  'prune.calibration.batch': 'batch',
  'data.cache': 'the cache directory, below XDG_CACHE_HOME',
  'data.chat_template': 'chat_template of load()',
}
# Options of the command that functions of the library stand for.
_OF_COMMAND = {
  'stages': 'call prune and recover in a loop',
  'stage_targets': 'call prune and recover in a loop',
  'calibration': 'draw rows by rows()',
  'samples': 'it is an argument of rows()',
  'length': 'it is an argument of rows()',
}
_NOT_IN_RECOVER = {
  'source': 'it is the argument text',
  'save_every': 'nothing is saved before the end',
  'split': 'there is one stage',
  'optimizer_state': 'there is one stage',
  **{field.name: f'write distill={{{field.name!r}: ...}}' for field in dataclasses.fields(DistillOptions)},
}


def as_library(function: Callable[_P, _T]) -> Callable[_P, _T]:
  """Makes messages name arguments instead of config fields; checks models and the caller's mesh."""
  signature = inspect.signature(function)

  def argument(match: re.Match[str]) -> str:
    if match[0] in _OTHER_NAMES:
      return _OTHER_NAMES[match[0]]
    known = {match[2], match[1].partition('.')[0]} & _NAMES  # not config.json
    return match[2] if known else match[0]

  @functools.wraps(function)
  def call(*args: _P.args, **options: _P.kwargs) -> _T:
    try:
      given = signature.bind(*args, **options).arguments
    except TypeError:
      given = {}  # the call below says what is wrong
    try:
      sharding.mesh()  # raises for one that is not ours
      for name in {'model', 'teacher'} & given.keys():
        _check_is_model(name, given[name])
      return function(*args, **options)
    except InputError as error:
      message = _FIELD.sub(argument, str(error)).replace('model.source', 'source')
      raise InputError(message) from None

  return call


def _check_is_model(name: str, value: Any) -> None:
  """Raises InputError for anything but a Model, or None as teacher."""
  if not hasattr(value, 'params') and not (name == 'teacher' and value is None):
    raise InputError(f'{name} is a {type(value).__name__}: pass a Model, as load() returns')


def check_model(config: ModelConfig) -> None:
  """Raises InputError for a model that cannot be pruned or trained, or that the current mesh cannot split."""
  if config.sliced_from:
    raise InputError('the model is sliced by SliceGPT and cannot be pruned or trained')
  mesh.check_model(config)


def check_tokenizer(tokenizer: Any) -> None:
  """Raises InputError without a tokenizer."""
  if tokenizer is None:
    raise InputError('the model has no tokenizer: give token ids, or a Model with a tokenizer')


def prune_options(named: dict[str, Any], tokens: np.ndarray, config: ModelConfig, seed: int) -> PruneOptions:
  """The options of `config.prune` with these values, for these rows; aligned for `serve` and the mesh."""
  for name, remedy in _OF_COMMAND.items():
    if name in named:
      raise InputError(f'{name} = {named[name]!r} is no option of prune(): {remedy}')
  calibration = {'samples': len(tokens), 'length': tokens.shape[1]}
  options = serving_widths.aligned(from_dict({'seed': seed, 'prune': named | {'calibration': calibration}}))
  if options.prune.method == slicegpt.METHOD:
    raise InputError(f'method = {slicegpt.METHOD!r} is for the CLI only: choose another')
  serving_widths.check_model(options.prune.serve, config)
  return options.prune


def calibration_rows(rows: Any, config: ModelConfig) -> np.ndarray:
  """Token ids [S, T] of calibration rows, which the devices of the mesh can split."""
  tokens = token_ids(rows, config, 'rows')
  _check_rows('rows', len(tokens))
  return tokens


def _check_rows(name: str, count: int) -> None:
  if count % (shards := sharding.row_shards()):
    raise InputError(f'{name}: {count} rows must be a multiple of the {shards} devices that split rows')


def pruning_method(
  options: PruneOptions, method: str | type[Method], importance: str | Importance
) -> type[Method] | None:
  """The class, if it differs from that of `options`: a user's class, or one with another importance."""
  found = None if isinstance(method, str) else method
  if found and not (isinstance(found, type) and issubclass(found, Method)):
    raise InputError(f'method = {found!r}: give a name or a subclass of Method, not an object of it')
  base = found or METHODS[options.method]
  if base.distance not in ('', *DISTANCES):
    raise InputError(f'{base.__name__}.distance = {base.distance!r}: choose {", ".join(DISTANCES)}')
  for where, value in (('importance', importance), (f'{base.__name__}.importance', base.importance)):
    if not isinstance(value, Importance) and value not in ('', *IMPORTANCES):
      raise InputError(f'{where} = {value!r}: give an Importance, or choose {", ".join(IMPORTANCES)}')
  if importance != '' and base.importance:
    raise InputError(
      f'importance: {base.__name__} has its own: leave it out, or choose the method adapt or uniform'
    )
  if isinstance(importance, str):
    return found
  return type(base.__name__, (base,), {'importance': importance})


def train_options(
  text: Text, tokens: int, distils: bool, options: dict[str, Any], config: ModelConfig, seed: int
) -> TrainOptions:
  """The options of `config.train`; `distils`: whether there is a teacher."""
  length = token_ids(text, config, 'text').shape[1] if is_ids(text) else 0
  for name, value in options.items():
    if name in _NOT_IN_RECOVER:
      raise InputError(f'{name} = {value!r} is no option of recover(): {_NOT_IN_RECOVER[name]}')
  if not isinstance(options.get('distill', {}), dict):
    raise InputError(f"distill = {options['distill']!r}: give a dict, such as {{'alpha': 0.5}}")
  given = {'tokens': tokens, 'save_every': 10**9, **options}
  if length and options.get('length', length) != length:
    raise InputError(f'length = {options["length"]!r}, but the rows of text have {length} ids: leave it out')
  if length and options.get('layout', 'packed') != 'packed':
    raise InputError(f'layout = {options["layout"]!r}, but the rows of text are full of ids: leave it out')
  given |= {'length': length} if length else {'source': entries(text)}
  distill = {'alpha': float(distils)} | dict(options.get('distill', {}))
  if distill.get('cache'):
    raise InputError(f'distill = {distill}: a cache is for the command; the teacher is in memory here: set 0')
  if distill['alpha'] and not distils:
    raise InputError(f'distill = {distill} needs a teacher: pass a Model as teacher=')
  train = from_dict({'seed': seed, 'train': given | {'distill': distill}}).train
  if tokens < train.batch * train.length:
    raise InputError(
      f'tokens = {tokens:,} is less than one batch of {train.batch} x {train.length}: give at least '
      f'{train.batch * train.length:,}, or lower batch or length'
    )
  _check_rows('batch', train.batch)
  return train


def generate_options(seed: int, **options: Any) -> RunOptions:
  """Options with these values of `config.generate`, and a seed."""
  return from_dict({'seed': seed, 'generate': options})


def is_ids(text: Text) -> TypeGuard[np.ndarray | jax.Array]:
  return isinstance(text, (np.ndarray, jax.Array))


def is_self(text: Text, length: int, config: ModelConfig, tokenizer: Any) -> bool:
  """Whether the model is to generate the rows. Raises InputError if it cannot."""
  if is_ids(text) or text != SELF:
    return False
  check_tokenizer(tokenizer)
  length = from_dict({'prune': {'calibration': {'length': length}}}).prune.calibration.length
  if length > config.max_position:
    raise InputError(
      f'length = {length} exceeds the context of the model ({config.max_position} tokens): lower it'
    )
  return True


def texts(name: str, value: Any) -> list[str]:
  """A string or several as a list. Raises InputError for anything else, naming the argument."""
  found = [value] if isinstance(value, str) else value
  if not isinstance(found, Sequence) or not all(isinstance(x, str) for x in found):
    raise InputError(f'{name} is a {type(value).__name__}: give a string or a list of strings')
  return list(found)


def directory(value: Any) -> pathlib.Path:
  """The path of a directory that may not exist yet. Raises InputError for anything else."""
  if not isinstance(value, (str, os.PathLike)):
    raise InputError(f'directory is a {type(value).__name__}: give a path')
  if (found := local(os.fspath(value))).exists() and not found.is_dir():
    raise InputError(f'directory = {str(found)!r} is a file: name a directory')
  return found


def dtype(value: Any) -> Any:
  """The dtype of weights that a value such as 'bfloat16' names. Raises InputError for others."""
  try:
    found = jnp.dtype(value)
  except TypeError:
    found = None
  if found not in map(jnp.dtype, DTYPES):
    raise InputError(f'dtype = {value!r}: choose {", ".join(DTYPES)}')
  return found


def entries(text: Any) -> tuple[str, ...]:
  """The entries of a source. Raises InputError for anything that names no text, or names the model."""
  found = [text] if isinstance(text, (str, os.PathLike)) else text
  if not isinstance(found, Sequence) or not all(isinstance(x, (str, os.PathLike)) for x in found):
    raise InputError(f'text is a {type(text).__name__}: give a file, several, or token ids [N, T]')
  if SELF in found:
    raise InputError(
      f'text = {text!r}: pass token ids, rows(model, {SELF!r}), joined with those of other texts'
    )
  return tuple(map(os.fspath, found))


def token_ids(tokens: Any, config: ModelConfig, name: str) -> np.ndarray:
  """Token ids int32 [N, T]. Raises InputError for anything else, naming the argument."""
  found = np.asarray(tokens)
  if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer) or found.size == 0 or found.shape[1] < 2:
    raise InputError(f'{name}: {found.dtype} of shape {list(found.shape)}: give token ids [N, T]')
  if found.min() < 0:
    raise InputError(f'{name} has the token id {found.min()}: ids start at 0')
  check_vocab(int(found.max()), config.vocab_size, name)
  return found.astype(np.int32)


def calibration_samples(samples: int, seed: int) -> int:
  """The number of rows, if `prune.calibration.samples` and `seed` may have these. Raises InputError."""
  return from_dict({'seed': seed, 'prune': {'calibration': {'samples': samples}}}).prune.calibration.samples


def evaluate_options(**options: Any) -> EvaluateOptions:
  """Options with these values of `config.evaluate`."""
  return from_dict({'evaluate': options}).evaluate


def data_options(text_field: str, messages_field: str) -> DataOptions:
  """Of `config.data`, with these fields of rows."""
  return from_dict({'data': {'text_field': text_field, 'messages_field': messages_field}}).data


def blocks(
  text: Text, data: DataOptions, config: ModelConfig, tokenizer: Any, length: int, most: int
) -> Blocks:
  """Windows of the first `most` tokens of a text, or the given rows."""
  if is_ids(text):
    ids = token_ids(text, config, 'text')
    targets = np.ones(ids.shape, bool)
    targets[:, 0] = False
    return Blocks(ids, targets, 0)
  check_tokenizer(tokenizer)
  length = from_dict({'evaluate': {'length': length}}).evaluate.length
  fields = {'text_field': data.text_field, 'messages_field': data.messages_field, 'field': 'text'}
  first = first_of_rows(config.traits, tokenizer)
  found = load_blocks(entries(text), tokenizer, length, **fields, max_tokens=most, first=first)
  check_vocab(int(found.tokens.max()), config.vocab_size, 'text')
  return found


def row_length(text: Text, length: int | None) -> int:
  """The length of rows of a text. Raises InputError for another one than that of ids."""
  if is_ids(text):
    found = text.shape[-1] if text.ndim else 0  # `blocks` refuses these
    if length not in (None, found):
      raise InputError(f'length = {length!r}, but the rows of text have {found} ids: leave it out')
    return found
  asked = {'calibration': {'length': 1024 if length is None else length}}
  return from_dict({'prune': asked}).prune.calibration.length


def train_set(
  text: Text, train: TrainOptions, data: DataOptions, config: ModelConfig, tokenizer: Any, seed: int
) -> TrainSet:
  """The rows of training of a text, or the given rows."""
  if is_ids(text):
    rows = ArrayRows(token_ids(text, config, 'text'))
    return TrainSet([rows], [1.0], length=train.length, batch=train.batch, seed=seed)
  check_tokenizer(tokenizer)
  first = first_of_rows(config.traits, tokenizer)
  return open_train_set(train, data, tokenizer, config.vocab_size, seed, first)
