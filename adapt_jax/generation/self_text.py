"""Text of the model's own: rows drawn from it, to calibrate or to train on where there is no other text.

Self-calibration (Williams et al., arXiv 2410.17170). A row begins as a user's turn of a chat, which the model
goes on to write and to answer (Magpie, Xu et al., arXiv 2406.08464), or with a token drawn from the whole
vocabulary (LLM-QAT, Liu et al., arXiv 2305.17888); every other row each way, where there is a chat template.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import numpy as np

from adapt_jax.config.values import SELF
from adapt_jax.generation.generator import Generator
from adapt_jax.generation.sampling import Sampling
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import load_source
from adapt_jax.machine.processes import say
from adapt_jax.machine.progress import Progress
from models.errors import InputError
from models.files import new_file
from models.formats.source import Source

_VERSION = 1  # of how rows are drawn
_BATCH = 16  # rows at once
_USER = 'a0b1c2'  # stands for the user's words in a template


def is_self(source: tuple[str, ...]) -> bool:
  """Whether the source is the model itself."""
  return source == (SELF,)


def check(source: tuple[str, ...], field: str) -> None:
  """Raises InputError where the model is one of several entries."""
  if SELF in source and not is_self(source):
    raise InputError(f'{field} = {source}: {SELF!r}, text of the model itself, must be the only entry')


def beginnings(tokenizer: Any, vocab_size: int, rows: int, seed: list[int]) -> list[list[int]]:
  """What each row begins with, token ids; those of a row depend on the seed and its place alone."""
  chat = _before_user(tokenizer)
  found = []
  for row in range(rows):
    # The ids of a tokenizer, not of the table: that may be padded with rows that mean nothing.
    first = int(np.random.default_rng([*seed, row]).integers(min(len(tokenizer), vocab_size)))
    found.append(chat if chat and row % 2 else [first])
  return found


def _before_user(tokenizer: Any) -> list[int]:
  """The ids that stand before a user's first words; none without a chat template."""
  if not tokenizer.chat_template:
    return []
  text = tokenizer.apply_chat_template([{'role': 'user', 'content': _USER}], tokenize=False)
  before = text.partition(_USER)[0].rstrip(' ')
  ids: list[int] = tokenizer(before, add_special_tokens=False)['input_ids']
  return ids


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

  Args:
    source: the dense model.
    tokenizer: whose chat template is used.
    seed: numbers; equal ones give equal rows.
    dtype: of activations and products.
    directory: where the files are kept; their names hash all that they depend on.
  """
  path = directory / f'self-{_key(source, tokenizer, rows, length, seed, dtype)}.npy'
  if not path.exists():
    say(f'drawing {rows:,} rows of {length:,} tokens from {source.name}')
    starts = [start[: length - 1] for start in beginnings(tokenizer, source.config.vocab_size, rows, seed)]
    params = load_source(source, dtype)
    generator = Generator(source.config, params, compiler=Compiler(), dtype=dtype, max_batch=_BATCH)
    key = int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1  # what int32 holds
    most = length - min(map(len, starts))
    with Progress('own text', rows * most, 'tokens') as progress:
      new = generator.generate(starts, most, Sampling(temperature=1.0), seed=key, progress=progress)
    tokens = [(start + more)[:length] for start, more in zip(starts, new, strict=True)]
    with new_file(path) as beside, open(beside, 'wb') as file:
      np.save(file, np.array(tokens, np.int32), allow_pickle=False)
  return path


def _key(source: Source, tokenizer: Any, *values: Any) -> str:
  files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in source.reader.files]
  parts = [_VERSION, files, tokenizer.chat_template, jax.default_backend(), *map(str, values)]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
