"""Text of the model's own: rows drawn from it, to calibrate or to train on where there is no other text.

Self-calibration (Williams et al., arXiv 2410.17170). A row begins as a user's turn of a chat, which the model
goes on to write and to answer (Magpie, Xu et al., arXiv 2406.08464), or with a token drawn from the whole
vocabulary (LLM-QAT, Liu et al., arXiv 2305.17888); every other row each way, where there is a chat template.
"""

import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from adapt_jax.config.values import SELF
from adapt_jax.generation.generator import Generator
from adapt_jax.generation.sampling import Sampling
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import load_source
from adapt_jax.machine.processes import WAITS, decide, say
from adapt_jax.machine.progress import Progress
from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.formats.source import Source

_VERSION = 1  # of how rows are drawn
_BATCH = 16  # rows at once
_USER = 'a0b1c2'  # stands for the user's words in a template


def is_self(source: tuple[str, ...]) -> bool:
  """Whether the source is the model itself."""
  return source == (SELF,)


def check(source: tuple[str, ...], length: int, max_position: int, field: str) -> None:
  """Raises InputError where the model is one of several entries, or was made for shorter rows.

  Args:
    field: the group of options, such as train.
    max_position: of the model.
  """
  if SELF in source and not is_self(source):
    raise InputError(
      f'config.{field}.source = {source}: {SELF!r}, text of the model itself, must be the only entry'
    )
  if is_self(source) and length > max_position:
    raise InputError(
      f'config.{field}.length = {length} is more than the {max_position} tokens that the model was made for, '
      f'and config.{field}.source is {SELF!r}: lower it'
    )


def draw(
  source: Source,
  tokenizer: Any,
  rows: int,
  length: int,
  *,
  seed: list[int],
  dtype: Any,
  directory: pathlib.Path,
) -> pathlib.Path:
  """A .npy file of `rows` rows of `length` tokens, drawn at temperature 1; made where it is not there.

  All processes call this and see `directory`; the first writes. What is drawn by SIGTERM, or a kill, is kept.
  Raises InputError where the directory cannot be written or seen, or the chat template fails.

  Args:
    source: the dense model.
    tokenizer: whose chat template is used.
    seed: numbers; equal ones give equal rows.
    dtype: of activations and products.
    directory: where the files are kept; their names hash all that they depend on.
  """
  name = f'self-{decide(lambda: _key(source, tokenizer, rows, length, seed, dtype))}'
  path, parts = directory / f'{name}.npy', directory / f'{name}-parts'

  def by_first(act: Callable[[], None]) -> None:
    def attempt() -> None:
      try:
        act()
      except OSError as error:
        raise InputError(
          f'config.data.cache: {directory} cannot be written ({error.strerror or first_line(error)}): name a '
          f'directory with room for {8 * rows * length:,} bytes'
        ) from None

    decide(attempt)

  if not decide(path.exists):
    batches = list(_batches(tokenizer, source.config.vocab_size, rows, length, seed))
    by_first(lambda: parts.mkdir(parents=True, exist_ok=True))
    say(f'{source.name} writes {rows:,} rows of {length:,} tokens')
    generator = None
    with Progress('own text', rows * length, 'tokens') as progress:
      for batch in batches:
        file = parts / f'{batch.rows[0]:09}.npy'
        if not decide(file.exists):
          if generator is None:
            params = load_source(source, dtype)
            generator = Generator(source.config, params, compiler=Compiler(), dtype=dtype, max_batch=_BATCH)
          tokens = _continue(generator, batch, length, seed, progress)
          by_first(functools.partial(_write, file, tokens))
        preemption.check()
    by_first(lambda: _join(parts, batches, np.zeros((rows, length), np.int32), path))
  for seconds in WAITS:
    time.sleep(seconds)
    if path.exists():
      return path
  raise InputError(
    f'config.data.cache: {path} cannot be read by process {jax.process_index()}: name a directory that all '
    f'processes see'
  )


class _Batch(NamedTuple):
  """Rows that are drawn together, and the ids that each begins with, as many for all of them."""

  rows: list[int]
  starts: list[list[int]]


def _batches(tokenizer: Any, vocab_size: int, rows: int, length: int, seed: list[int]) -> Iterator[_Batch]:
  """What a row begins with depends on the seed and its place alone."""
  chat = _before_user(tokenizer)[: length - 1]
  kinds = [range(0, rows, 2), range(1, rows, 2)] if chat else [range(rows)]
  # The ids of the tokenizer, not of the table: that may be padded with rows that mean nothing.
  ids = min(len(tokenizer), vocab_size)
  for kind, of_kind in enumerate(kinds):
    for at in range(0, len(of_kind), _BATCH):
      chosen = list(of_kind[at : at + _BATCH])
      first = [int(np.random.default_rng([*seed, row]).integers(ids)) for row in chosen]
      yield _Batch(chosen, [chat if kind else [token] for token in first])


def _continue(
  generator: Generator, batch: _Batch, length: int, seed: list[int], progress: Progress
) -> np.ndarray:
  """Rows of `length` tokens: int32 [rows of the batch, length]."""
  key = int(np.random.SeedSequence([*seed, batch.rows[0]]).generate_state(1)[0]) >> 1  # what int32 holds
  new = generator.generate(
    batch.starts, length - len(batch.starts[0]), Sampling(temperature=1.0), seed=key, progress=progress
  )
  return np.array([start + more for start, more in zip(batch.starts, new, strict=True)], np.int32)


def _before_user(tokenizer: Any) -> list[int]:
  """The ids that stand before a user's first words; none without a chat template. Raises InputError."""
  if not tokenizer.chat_template:
    return []
  try:
    text = tokenizer.apply_chat_template([{'role': 'user', 'content': _USER}], tokenize=False)
  except Exception as error:  # whatever the template's own code raises
    raise InputError(
      f'the chat template refuses the message of a user ({first_line(error)}): set config.data.chat_template'
    ) from None
  before = text.partition(_USER)[0].rstrip(' ')
  ids: list[int] = tokenizer(before, add_special_tokens=False)['input_ids']
  return ids


def _write(path: pathlib.Path, tokens: np.ndarray) -> None:
  """Whole or not at all, whoever writes the same beside."""
  beside = path.with_name(f'.{path.name}-{secrets.token_hex(8)}')
  try:
    with open(beside, 'wb') as file:
      np.save(file, tokens, allow_pickle=False)
      file.flush()
      os.fsync(file.fileno())
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


def _join(parts: pathlib.Path, batches: list[_Batch], tokens: np.ndarray, path: pathlib.Path) -> None:
  for batch in batches:
    tokens[batch.rows] = np.load(parts / f'{batch.rows[0]:09}.npy', allow_pickle=False)
  _write(path, tokens)
  shutil.rmtree(parts, ignore_errors=True)


def _key(source: Source, tokenizer: Any, *values: Any) -> str:
  files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.reader.files]
  parts = [_VERSION, files, tokenizer.chat_template, jax.default_backend(), *map(str, values)]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
