"""Loads the token blocks of a run's texts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import OWN, SELF, TEXT
from adapt_jax.data.chat_templates import with_template
from adapt_jax.data.documents import is_blocks
from adapt_jax.data.token_cache import token_directory
from adapt_jax.data.train_set import TrainSet, open_train_set
from adapt_jax.data.windows import (
  POOL_TOKENS,
  Blocks,
  check_targets,
  check_vocab,
  first_of_rows,
  load_blocks,
  load_stream,
  mixed,
  quotas,
  read_for,
  spread,
)
from adapt_jax.generation import self_text
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import Source
from adapt_jax.models.network.backend import compute_dtype

_OWN_ROWS, _OWN_LENGTH = 16, 256  # of `Loader.own`


class Loader:
  """Loads token blocks of a run's sources.

  source: the dense model. tokenizer: its tokenizer.
  cache: shared with loaders of other options and the same tokenizer, so that no blocks are made twice.
  """

  def __init__(
    self, options: RunOptions, source: Source, tokenizer: Any, cache: dict[Any, Any] | None = None
  ):
    self.tokenizer = with_template(tokenizer, options.data.chat_template)
    self._options, self._source, self._config = options, source, source.config
    self._cache: dict[Any, Any] = {} if cache is None else cache

  def load(
    self, field: str, source: tuple[str, ...], length: int, tokens: int = 0, layout: str = 'packed'
  ) -> Blocks:
    """Windows of `length` tokens from the first `tokens` (at least `POOL_TOKENS`) tokens of the source.

    layout: as `prune.calibration.layout`; the rows of a .npy file are used as they are.
    """
    limit = max(tokens, POOL_TOKENS)
    self._warn_beyond_context(field, length)
    key = (self._options.data, source, limit, length, layout, self._options.seed)
    blocks: Blocks = self._once(key, lambda: self._read(field, source, length, limit, layout))
    check_vocab(int(blocks.tokens.max()), self._config.vocab_size, field)
    _check_same(blocks, field)
    check_targets(bool(blocks.targets.any()), field)
    return blocks

  def _read(self, field: str, source: tuple[str, ...], length: int, limit: int, layout: str) -> Blocks:
    data, seed = self._options.data, self._options.seed
    first = first_of_rows(self._config.traits, self.tokenizer)
    fields = data.fields | {'field': field}
    if is_blocks(source):
      return load_blocks(source, length, limit, field)
    stream = load_stream(token_directory(data), source, self.tokenizer, limit, first, **fields)
    return stream.spans(length, seed, field) if layout == 'documents' else stream.blocks(length, field)

  def calibration(self) -> Blocks:
    """The rows that calibration draws from; `own` of those drawn are the model's."""
    c = self._options.prune.calibration
    self_text.check(c.source, c.length, self._config.max_position, 'prune.calibration', c.own)

    def load(source: tuple[str, ...], rows: int) -> Blocks:
      if self_text.is_self(source):
        source = self._own_text(self._source, rows, c.length, self_text.CALIBRATION)
      tokens = rows * (c.length + 1)  # a row of text and the target after it
      return self.load('prune.calibration.source', source, c.length, tokens, c.layout)

    parts: list[tuple[tuple[str, ...], float]] = [(c.source, 1.0)]
    if c.weights:
      parts = [((entry,), share) for entry, share in zip(c.source, c.weights, strict=True)]
    own = 0.0 if self_text.is_self(c.source) else c.own
    total = sum(share for _, share in parts)
    parts = [(source, (1 - own) * share / total) for source, share in parts] + [((SELF,), own)]
    sources, shares = zip(*(part for part in parts if part[1]), strict=True)
    if len(sources) == 1:
      return load(sources[0], c.samples)
    blocks = [load(s, max(1, rows)) for s, rows in zip(sources, quotas(shares, c.samples), strict=True)]
    return mixed([', '.join(source) for source in sources], blocks, shares)

  def train_set(self, speaker: Source | None = None) -> TrainSet:
    """The rows of training, from the cache on disk; `speaker` generates those of `self`, or the model."""
    o, train = self._options, self._options.train
    self._warn_beyond_context('train.source', train.length)
    if self_text.is_self(train.source):
      rows, speaker = -(-train.tokens // train.length), speaker or self._source
      self_text.check(train.source, train.length, speaker.config.max_position, 'train')
      own = self._own_text(speaker, rows, train.length, self_text.TRAINING)
      train = dataclasses.replace(train, source=own)
    vocab_size, first = self._config.vocab_size, first_of_rows(self._config.traits, self.tokenizer)
    return open_train_set(train, o.data, self.tokenizer, vocab_size, o.seed, first)

  def _own_text(self, speaker: Source, rows: int, length: int, use: int) -> tuple[str, ...]:
    """The source of rows that a model generates; each `use` has different rows."""
    o = self._options
    seed = 0 if use == self_text.HEALTH else o.seed  # a text to measure on is the same for all runs
    drawn: dict[str, Any] = {'seed': [seed, use], 'dtype': compute_dtype(o.model.dtype)}
    directory = token_directory(o.data)
    path = self_text.draw(speaker, self.tokenizer, rows, length, **drawn, directory=directory)
    return (str(path),)

  def own(self, speaker: Source | None = None) -> Blocks:
    """Rows that `speaker`, or the model, generates for `evaluate.health`: 256 tokens, or its context.

    16 of them, or as many as `evaluate.max_tokens` has room for.
    """
    length, most = min(_OWN_LENGTH, self._config.max_position), self._options.evaluate.max_tokens
    rows = min(_OWN_ROWS, max(1, most // length)) if most else _OWN_ROWS
    source = self._own_text(speaker or self._source, rows, length, self_text.HEALTH)
    return self.load(evaluation_field(OWN), source, length)

  def _warn_beyond_context(self, name: str, length: int) -> None:
    """Warns once if rows exceed the context; that is no error, since training may extend it."""
    longest = self._config.max_position
    line = f'{name}: its rows of {length:,} tokens exceed the context of the model ({longest:,} tokens)'
    if length > longest:
      self._once(line, lambda: say(f'{line}, beyond which it may predict badly'))

  def _once(self, key: Any, make: Callable[[], Any]) -> Any:
    if key not in self._cache:
      self._cache[key] = make()
    return self._cache[key]

  def evaluation(self) -> dict[str, Blocks]:
    """The windows of each text: at most `evaluate.max_tokens` tokens, evenly spaced over what is read."""
    return {name: self._windows(name, source) for name, source in self._options.evaluate.texts.items()}

  def _windows(self, name: str, source: tuple[str, ...]) -> Blocks:
    e = self._options.evaluate
    field, limit = evaluation_field(name), read_for(e.max_tokens)
    blocks = self.load(field, source, e.length, limit)
    if blocks.tokens.size > max(limit - e.length, e.max_tokens):
      line = f'{field}: its windows are spread over its first {limit:,} tokens, and no more are read'
      self._once(line, lambda: say(line))
    return spread(blocks, e.max_tokens)


def evaluation_field(name: str) -> str:
  """The name of an evaluated text in messages."""
  fields = {TEXT: 'evaluate.source', OWN: 'evaluate.health'}
  return fields.get(name, f'evaluate.source ({name})')


def _check_same(blocks: Blocks, field: str) -> None:
  """Raises InputError if this process has read different windows from the first process."""
  if jax.process_count() > 1 and decide(blocks.digest) != blocks.digest():
    raise InputError(
      f'{field}: process {jax.process_index()} reads other data than process 0: give all the same files'
    )
