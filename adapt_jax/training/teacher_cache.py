"""The teacher's predictions on the training rows, on disk: for teachers that do not fit next to the student.

A directory of the workdir with one entry for each row that training uses, even if it is used several times:

    ids.npy     uint16 or uint32 [rows, T, k]: the teacher's k most likely next ids for each token
    log_p.npy   float16 [rows, T, k+1]: their log-probabilities, and that of all other ids together
    check.npy   uint32 [rows]: a checksum of the row that the teacher saw
    done        number of rows written

A run that was killed continues after the last row counted by `done`. Training refuses a row whose tokens
have changed since the teacher saw it.
"""

import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from adapt_jax.config.options import TrainOptions
from adapt_jax.data.train_set import TrainSet
from adapt_jax.machine import mesh, preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.processes import decide, is_first
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.files import read_text, write_text
from adapt_jax.models.formats.npy import open_npy
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.training.loss import teacher_top
from adapt_jax.training.step import Teacher

_LOWEST = -1e4  # a log p that fits in float16 and whose p is 0
_FILES = ('ids', 'log_p', 'check')


class TaughtSet:
  """A train set whose rows include the teacher's predictions."""

  def __init__(self, data: TrainSet, rows: np.ndarray, directory: pathlib.Path):
    self._data, self._rows = data, rows
    self._directory = directory
    self._ids, self._log_p, self._check = (open_npy(directory / f'{name}.npy') for name in _FILES)

  def rows(self, step: int) -> np.ndarray:
    """The rows of batch number `step`, as in `TrainSet.rows`."""
    return self._data.rows(step)

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tokens, targets and segments [n, T], ids int32 [n, T, k] and log p fp32 [n, T, k+1] of these rows.

    Raises InputError for rows that differ from those that the teacher saw.
    """
    places, seen = np.searchsorted(self._rows, rows), self._data.read(rows)
    if not np.array_equal(_checksums(*seen), self._check[places]):
      raise InputError(
        f'{self._directory} does not match the rows of train.source: restore its text, or start a new workdir'
      )
    return (*seen, self._ids[places].astype(np.int32), self._log_p[places].astype(np.float32))


def _checksums(tokens: np.ndarray, targets: np.ndarray, segments: np.ndarray) -> np.ndarray:
  """A checksum of each row, uint32."""
  rows = zip(tokens, segments, strict=True)
  return np.array(
    [zlib.crc32(segment.tobytes(), zlib.crc32(token.tobytes())) for token, segment in rows], np.uint32
  )


def open_taught(
  directory: pathlib.Path,
  data: TrainSet,
  options: TrainOptions,
  steps: int,
  load_teacher: Callable[[], Teacher],
  *,
  dtype: Any,
  compiler: Compiler,
) -> TaughtSet:
  """The rows of all `steps` with the teacher's predictions; computes those that are not on disk yet.

  Args:
    directory: directory of the files; all processes must see it.
    load_teacher: called only if predictions are missing.
    dtype: dtype of the teacher's activations.
    compiler: counts the program as `teacher`.

  Raises `Preempted` after SIGTERM; predictions computed by then are kept.
  """
  rows = np.unique(np.concatenate([data.rows(step) for step in range(steps)]))
  done = decide(lambda: _done(directory))
  if done < len(rows):
    if done:
      _check_files(directory, len(rows), options)  # before the teacher is loaded
    _ask(directory, data, options, rows, done, load_teacher(), dtype=dtype, compiler=compiler)
  _check_files(directory, len(rows), options)
  return TaughtSet(data, rows, directory)


def _check_files(directory: pathlib.Path, rows: int, options: TrainOptions) -> None:
  try:
    if tuple(open_npy(directory / f'{name}.npy').shape for name in _FILES) != _shapes(rows, options):
      raise ValueError('a file has another shape')
  except (OSError, ValueError) as error:
    raise InputError(
      f'{directory} is damaged ({first_line(error)}): delete it, and the teacher is asked again'
    ) from None


def _done(directory: pathlib.Path) -> int:
  path = directory / 'done'
  try:
    return int(read_text(path)) if path.exists() else 0
  except InputError:
    raise
  except ValueError:
    raise InputError(f'{path} is damaged: delete {directory}, and the teacher is asked again') from None


def _ask(
  directory: pathlib.Path,
  data: TrainSet,
  options: TrainOptions,
  rows: np.ndarray,
  done: int,
  teacher: Teacher,
  *,
  dtype: Any,
  compiler: Compiler,
) -> None:
  count = mesh.rows_at_once(options.batch, options.micro_batch)
  files = _files(directory, len(rows), options, teacher.config.vocab_size, new=not done) if is_first() else {}
  top, program = likeliest(teacher.config, options, dtype), None
  with Progress('teacher', (len(rows) - done) * options.length, 'tokens') as progress:
    for start in range(done, len(rows), count):
      some = rows[start : start + count]
      padded = np.pad(some, (0, count - len(some)), mode='edge')  # all batches have one shape, so one program
      tokens, _, segments = mesh.put_rows(padded, data.read)
      if program is None:
        program = compiler('teacher', top, teacher.params, tokens, segments)
      found = multihost_utils.process_allgather(program(teacher.params, tokens, segments), tiled=True)
      if is_first():
        stop = start + len(some)
        for name, values in zip(_FILES, (*found, _checksums(*data.read(some))), strict=True):
          files[name][start:stop] = values[: len(some)]
        _write_done(directory, stop, files)
      progress.update(len(some) * options.length)
      preemption.check()
  decide(lambda: 0)  # all processes wait until the last row is written


def likeliest(
  config: ModelConfig, options: TrainOptions, dtype: Any
) -> Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """The program `(parameters of the dense model, tokens, segments [B, T])` -> ids and log p, as on disk."""

  def top(params: Params, tokens_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD = llama.hidden_states(config, params, tokens_BT, segments=segments_BT, dtype=dtype)
    x_TD, head_VD = x_BTD.reshape(-1, x_BTD.shape[-1]), llama.head(params)
    found = teacher_top(x_TD, head_VD, options.distill.cache, config.logit_cap)
    ids, log_p = (x.reshape(*tokens_BT.shape, -1) for x in found)
    return ids, jnp.maximum(log_p, _LOWEST)

  return top


def _files(
  directory: pathlib.Path, rows: int, options: TrainOptions, vocab_size: int, *, new: bool
) -> dict[str, np.memmap]:
  """The files to write. New ones are allocated in full, so that a full disk raises OSError now, not later."""
  directory.mkdir(parents=True, exist_ok=True)
  ids, found = np.uint16 if vocab_size <= 2**16 else np.uint32, {}
  for name, dtype, shape in zip(_FILES, (ids, np.float16, np.uint32), _shapes(rows, options), strict=True):
    path = directory / f'{name}.npy'
    if not new:
      found[name] = open_npy(path, 'r+')
      continue
    path.unlink(missing_ok=True)
    found[name] = np.lib.format.open_memmap(path, mode='w+', dtype=dtype, shape=shape)
    if hasattr(os, 'posix_fallocate'):  # not on macOS
      with open(path, 'r+b') as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
  return found


def _shapes(rows: int, options: TrainOptions) -> tuple[tuple[int, ...], ...]:
  length, k = options.length, options.distill.cache
  return (rows, length, k), (rows, length, k + 1), (rows,)


def _write_done(directory: pathlib.Path, count: int, files: dict[str, np.memmap]) -> None:
  for file in files.values():
    file.flush()
  write_text(directory / 'done', str(count))
