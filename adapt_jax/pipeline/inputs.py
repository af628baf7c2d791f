"""Opens and checks all that a run reads, cheap checks first, before any heavy work."""

import dataclasses
import hashlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.options import RunOptions
from adapt_jax.data.chat_templates import read_template, with_template
from adapt_jax.data.documents import check_source, is_blocks
from adapt_jax.data.train_set import TrainSet, open_train_set
from adapt_jax.data.windows import Blocks, check_vocab, load_blocks, load_stream
from adapt_jax.export.writer import check_result, check_tokenizer
from adapt_jax.machine import mesh
from adapt_jax.machine.processes import decide
from adapt_jax.pruning import serving_widths, surgery
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.pruner import target_params
from adapt_jax.training.step import stage_steps
from models.config import ModelConfig
from models.errors import InputError
from models.formats.source import Source, open_source
from models.network.llama import Params
from models.network.sharding import shardings

# A source is read this far at least, so that draws cover more than its first documents; a stream of a
# hub data set has to end somewhere.
_POOL_TOKENS = 2**22


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The dense model, opened but not loaded, and its data; `train` and `evaluate` may be absent.

  dtype: of activations and matrix products.
  output_bias: the run needs biases at the output projections: they are added, as zeros, where there are none.
  """

  source: Source
  tokenizer: Any
  calibration: Blocks
  train: TrainSet | None
  evaluate: Blocks | None
  dtype: Any
  output_bias: bool = False

  @property
  def config(self) -> ModelConfig:
    return _biased(self.source.config, self.output_bias)

  def load_params(self, dtype: Any) -> Params:
    """The source's parameters, the run's biases added, in `dtype` or, with None, each in its own."""
    params = load_source(self.source, dtype)
    return mesh.jit(self._with_biases, params)(params) if self.output_bias else params

  def _with_biases(self, params: Params) -> Params:
    return surgery.with_output_bias(self.source.config, params)[1]

  def abstract_params(self, dtype: Any) -> Params:
    """Their shapes and dtypes as `jax.ShapeDtypeStruct`."""
    shapes = self.source.abstract_params(dtype)
    if not self.output_bias:
      return shapes
    return jax.eval_shape(self._with_biases, shapes)


def load_source(source: Source, dtype: Any) -> Params:
  """The parameters on the mesh, in `dtype` or, with None, each in its own; a process reads its own slices."""
  return source.load_params(dtype, shardings(source.abstract_params(dtype)))


def _biased(config: ModelConfig, biased: bool) -> ModelConfig:
  return dataclasses.replace(config, output_bias=True) if biased else config


def compute_dtype(name: str) -> Any:
  """`model.dtype` as a dtype; auto is float32 on CPU, for the same figures on any, else bfloat16."""
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def prepare(options: RunOptions) -> Inputs:
  """Inputs of modes accel and prune. Raises InputError for anything a user must correct."""
  check_sources(options)
  source = open_source(options.model.source)
  check_plan(options, source.config)
  return load(options, source, Loader(options, source.load_tokenizer(), source.config))


def load(options: RunOptions, source: Source, loader: 'Loader') -> Inputs:
  """Tokenises what `check_sources` and `check_plan` have found well."""
  check_tokenizer(options.export, loader.tokenizer)
  calibration = options.prune.calibration
  blocks = loader.load('prune.calibration.source', calibration.source, calibration.length)
  if len(blocks.tokens) < calibration.samples:
    raise InputError(
      f'config.prune.calibration.samples = {calibration.samples}, but the source has only '
      f'{len(blocks.tokens)} rows of {calibration.length} tokens: lower it or give more text'
    )
  train = loader.train_set() if options.train.tokens else None
  evaluate = loader.evaluation() if options.evaluate.source else None
  dtype = compute_dtype(options.model.dtype)
  biased = options.prune.compensate == 'bias'
  return Inputs(source, loader.tokenizer, blocks, train, evaluate, dtype, biased)


class Loader:
  """Token blocks of a run's sources; one that serves twice, cut to two lengths, is tokenised once.

  cache: of loaders of other options with the same tokenizer, to tokenise nothing twice for them all.
  """

  def __init__(
    self, options: RunOptions, tokenizer: Any, config: ModelConfig, cache: dict[Any, Any] | None = None
  ):
    self.tokenizer = with_template(tokenizer, options.data.chat_template)
    self._options, self._config = options, config
    self._cache: dict[Any, Any] = {} if cache is None else cache

  def load(self, field: str, source: tuple[str, ...], length: int, tokens: int = 0) -> Blocks:
    """Windows of `length` tokens from the first `tokens` of the source, at least from a pool to draw from."""
    name, limit = f'config.{field}', max(tokens, _POOL_TOKENS)
    data = self._options.data
    fields: dict[str, Any] = {'text_field': data.text_field, 'messages_field': data.messages_field}
    fields |= {'field': name, 'max_tokens': limit}
    key = (data, source, limit)
    if is_blocks(source):
      blocks = self._once((*key, length), lambda: load_blocks(source, self.tokenizer, length, **fields))
    else:
      stream = self._once(key, lambda: load_stream(source, self.tokenizer, **fields))
      blocks = self._once((*key, length), lambda: stream.blocks(length, name))
    check_vocab(int(blocks.tokens.max()), self._config.vocab_size, name)
    _check_same(blocks, name)
    if not blocks.targets.any():
      raise InputError(
        f'{name}: no token to predict in {len(blocks.tokens)} rows of {length} tokens: chats need '
        f"the assistant's messages"
      )
    return blocks

  def train_set(self) -> TrainSet:
    """The rows of training, from the cache on disk."""
    o = self._options
    return open_train_set(o.train, o.data, self.tokenizer, self._config.vocab_size, o.seed)

  def _once(self, key: Any, make: Callable[[], Any]) -> Any:
    if key not in self._cache:
      self._cache[key] = make()
    return self._cache[key]

  def evaluation(self) -> Blocks:
    """The evaluation windows: at most `evaluate.max_tokens` tokens, evenly spaced over the source."""
    e = self._options.evaluate
    blocks = self.load('evaluate.source', e.source, e.length, e.max_tokens or sys.maxsize)
    count = len(blocks.tokens)
    wanted = max(1, e.max_tokens // e.length) if e.max_tokens else count
    if wanted >= count:
      return blocks
    rows = np.linspace(0, count - 1, wanted).round().astype(int)
    return dataclasses.replace(blocks, tokens=blocks.tokens[rows], targets=blocks.targets[rows])


def _check_same(blocks: Blocks, field: str) -> None:
  """Raises InputError if this process has read other windows than the first."""
  if jax.process_count() == 1:
    return

  def digest() -> str:
    return hashlib.sha256(blocks.tokens.tobytes() + blocks.targets.tobytes()).hexdigest()

  if decide(digest) != digest():
    raise InputError(
      f'{field}: process {jax.process_index()} does not read what the first reads: give all the same files'
    )


def check_sources(options: RunOptions) -> None:
  """Checks that every source of the run can be read; tokenises nothing. Raises InputError."""
  read_template(options.data.chat_template)
  fields = {'prune.calibration.source': options.prune.calibration.source}
  if options.train.tokens:
    fields['train.source'] = options.train.source
  if options.evaluate.source:
    fields['evaluate.source'] = options.evaluate.source
  for field, source in fields.items():
    check_source(
      source,
      f'config.{field}',
      text_field=options.data.text_field,
      messages_field=options.data.messages_field,
    )


def check_plan(options: RunOptions, config: ModelConfig) -> None:
  """Checks widths for prune.serve, the target, the batches of each stage, the forms. Raises InputError.

  config: of the source.
  """
  serving_widths.check_model(options.prune.serve, config)
  _check_target(options, config)
  _check_steps(options)
  check_result(options.export, _biased(config, options.prune.compensate == 'bias'))
  mesh.check_model(config)
  mesh.check_batches(options)


def _check_target(options: RunOptions, config: ModelConfig) -> None:
  target = target_params(config, options.prune.target)
  pruned = _biased(config, options.prune.compensate == 'bias')
  smallest = METHODS[options.prune.method](pruned, options.prune).smallest()
  if target < smallest:
    raise InputError(
      f'config.prune.target = {options.prune.target:g} asks for {target:,} parameters, but what '
      f'config.prune.method = {options.prune.method!r} always keeps already has {smallest:,}: raise it'
    )


def _check_steps(options: RunOptions) -> None:
  t = options.train
  ends = [0, *stage_steps(t, options.prune.stages)]
  if t.tokens and any(stop <= start for start, stop in itertools.pairwise(ends)):
    raise InputError(
      f'config.train.tokens = {t.tokens:,} leaves a stage without a batch of {t.batch} x {t.length} tokens; '
      f'it is split over {options.prune.stages} stages ({t.split}): raise it, or lower '
      f'train.batch or prune.stages'
    )
