"""The teacher's predictions on the training rows, on disk: for teachers that do not fit next to the student.

A directory of the workdir with one record for each row that training uses, even if it is used several times:

    rows.npy    ids: uint16 or uint32 [T, k], the teacher's k most likely next ids for each token
                log_p: float16 [T, k+1], their log-probabilities, and that of all other ids together
                check: uint32, a checksum of both and of the row that the teacher saw
    done        number of rows written

A run that was killed continues after the last row counted by `done`. Training refuses a row whose tokens
have changed since the teacher saw it, and one whose predictions are damaged.
"""

import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

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
from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import read_text, write_text
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.training.loss import teacher_top
from adapt_jax.training.step import Teacher, in_rows

_LOWEST = -1e4  # a log p that fits in float16 and whose p is 0
_REMEDY = 'delete this directory, and the teacher is asked again'


class TaughtSet:
  """A train set whose rows include the teacher's predictions."""

  def __init__(self, data: TrainSet, rows: np.ndarray, directory: pathlib.Path):
    self._data, self._rows, self._directory = data, rows, directory
    self._told = _open(directory, len(rows))

  def rows(self, step: int) -> np.ndarray:
    """The rows of batch number `step`, as in `TrainSet.rows`."""
    return self._data.rows(step)

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tokens, targets and segments [n, T], ids int32 [n, T, k] and log p fp32 [n, T, k+1] of these rows.

    Raises InputError for rows that differ from those that the teacher saw, and for damaged predictions.
    """
    seen, told = self._data.read(rows), self._told[np.searchsorted(self._rows, rows)]
    if not np.array_equal(_checksums(seen, told), told['check']):
      raise InputError(
        f'{self._directory} is damaged, or the text of train.source has changed: restore it, or {_REMEDY}'
      )
    return (*seen, told['ids'].astype(np.int32), told['log_p'].astype(np.float32))


def _checksums(seen: tuple[np.ndarray, ...], told: np.ndarray) -> np.ndarray:
  """A checksum of each row and its predictions, uint32."""
  sums = np.zeros(len(told), np.uint32)
  for part in (seen[0], seen[2], told['ids'], told['log_p']):
    sums = np.array([zlib.crc32(x.tobytes(), value) for x, value in zip(part, sums.tolist(), strict=True)])
  return sums.astype(np.uint32)


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
  done = decide(lambda: _done(directory, len(rows)))
  if done < len(rows):
    teacher = load_teacher()
    if not done:
      decide(lambda: _create(directory, len(rows), options, teacher.config.vocab_size))
    _ask(directory, data, options, rows, done, teacher, dtype=dtype, compiler=compiler)
  return TaughtSet(data, rows, directory)


def _done(directory: pathlib.Path, rows: int) -> int:
  """How many rows are written."""
  path = directory / 'done'
  with reading('the predictions of the teacher', directory, _REMEDY):
    directory.mkdir(parents=True, exist_ok=True)
    done = int(read_text(path)) if path.exists() else 0
  if done:
    _open(directory, rows)  # raises before the teacher is loaded
  return done


def _open(directory: pathlib.Path, rows: int, mode: Literal['r', 'r+'] = 'r') -> np.ndarray:
  with reading('the predictions of the teacher', directory, _REMEDY):
    told: np.ndarray = np.load(directory / 'rows.npy', mmap_mode=mode, allow_pickle=False)
    if told.shape != (rows,):
      raise ValueError(f'it holds {list(told.shape)} rows instead of {rows}')
  return told


def _create(directory: pathlib.Path, rows: int, options: TrainOptions, vocab_size: int) -> None:
  """Allocates the file in full, so that a full disk raises OSError now, not later."""
  path, length, k = directory / 'rows.npy', options.length, options.distill.cache
  ids = np.uint16 if vocab_size <= 2**16 else np.uint32
  record = [('ids', ids, (length, k)), ('log_p', np.float16, (length, k + 1)), ('check', np.uint32)]
  path.unlink(missing_ok=True)
  np.lib.format.open_memmap(path, mode='w+', dtype=np.dtype(record), shape=(rows,))
  if hasattr(os, 'posix_fallocate'):  # not on macOS
    with open(path, 'r+b') as file:
      os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


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
  file: Any = _open(directory, len(rows), 'r+') if is_first() else None
  asked = predictions(data, options, rows[done:], teacher, dtype=dtype, compiler=compiler)
  for some, ids, log_p in asked:
    if is_first():
      stop, told = done + len(some), np.zeros(len(some), file.dtype)
      told['ids'], told['log_p'] = ids, log_p
      told['check'] = _checksums(data.read(some), told)
      file[done:stop] = told
      file.flush()
      write_text(directory / 'done', str(stop))
    done += len(some)
  decide(lambda: 0)  # all processes wait until the last row is written


def predictions(
  data: TrainSet, options: TrainOptions, rows: np.ndarray, teacher: Teacher, *, dtype: Any, compiler: Compiler
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Yields some of the rows, and what the teacher says: ids [n, T, k] and log p [n, T, k+1], on all hosts.

  Raises `Preempted` after SIGTERM.
  """
  count = mesh.rows_at_once(options.batch, options.at_once)
  top, program = likeliest(teacher.config, options, dtype), None
  with Progress('teacher', len(rows) * options.length, 'tokens') as progress:
    for start in range(0, len(rows), count):
      some = rows[start : start + count]
      padded = np.pad(some, (0, count - len(some)), mode='edge')  # all batches have one shape, so one program
      tokens, _, segments = mesh.put_rows(padded, data.read)
      if program is None:
        program = compiler('teacher', top, teacher.params, tokens, segments)
      told = multihost_utils.process_allgather(program(teacher.params, tokens, segments), tiled=True)
      ids, log_p = (np.asarray(x)[: len(some)] for x in told)
      yield some, ids, log_p
      progress.update(len(some) * options.length)
      preemption.check()


def likeliest(
  config: ModelConfig, options: TrainOptions, dtype: Any
) -> Callable[[Params, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """The program `(parameters of the dense model, tokens, segments [B, T])` -> ids and log p, as on disk."""

  def top(params: Params, tokens_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    segments = in_rows(options, segments_BT)
    x_BTD = llama.hidden_states(config, params, tokens_BT, segments=segments, dtype=dtype)
    x_TD, head_VD = x_BTD.reshape(-1, x_BTD.shape[-1]), llama.head(params)
    found = teacher_top(x_TD, head_VD, options.distill.cache, config.logit_cap)
    ids, log_p = (x.reshape(*tokens_BT.shape, -1) for x in found)
    return ids, jnp.maximum(log_p, _LOWEST)

  return top
