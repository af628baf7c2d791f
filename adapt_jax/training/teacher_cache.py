"""What the teacher says of the training rows, on disk: for teachers that do not fit beside the student.

A directory of the workdir with an entry for every row that training sees, each once however often it comes:

    ids.npy     uint16 or uint32 [rows, T, k]: of each token the teacher's k likeliest next ones
    log_p.npy   float16 [rows, T, k+1]: their log-probabilities, and that of all other ids together
    done        how many rows are written

A run that was killed goes on after the last row that `done` counts.
"""

import pathlib
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
from adapt_jax.training.loss import teacher_top
from adapt_jax.training.step import Teacher
from models.files import write_text
from models.network import llama
from models.network.llama import Params

_LOWEST = -1e4  # log p that float16 holds, and whose p is 0


class TaughtSet:
  """A train set whose rows come with what the teacher said of them."""

  def __init__(self, data: TrainSet, rows: np.ndarray, directory: pathlib.Path):
    self._data, self._rows = data, rows
    self._ids, self._log_p = (
      np.load(directory / f'{name}.npy', mmap_mode='r', allow_pickle=False) for name in ('ids', 'log_p')
    )

  def rows(self, step: int) -> np.ndarray:
    """The rows of batch number `step`, as `TrainSet.rows` has them."""
    return self._data.rows(step)

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tokens, targets and segments [n, T], ids int32 [n, T, k] and log p fp32 [n, T, k+1] of these rows."""
    places = np.searchsorted(self._rows, rows)
    taught = self._ids[places].astype(np.int32), self._log_p[places].astype(np.float32)
    return (*self._data.read(rows), *taught)


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
  """The rows of all `steps` with what the teacher says of them; asks it what is not on disk yet.

  Args:
    directory: of the files; all processes see it.
    load_teacher: called only where something is missing.
    dtype: of the teacher's activations.
    compiler: counts the program as `teacher`.

  Raises `Preempted` after SIGTERM; what is done by then is kept.
  """
  rows = np.unique(np.concatenate([data.rows(step) for step in range(steps)]))
  done = decide(lambda: _done(directory))
  if done < len(rows):
    _ask(directory, data, options, rows, done, load_teacher(), dtype=dtype, compiler=compiler)
  return TaughtSet(data, rows, directory)


def _done(directory: pathlib.Path) -> int:
  path = directory / 'done'
  return int(path.read_text()) if path.exists() else 0


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
  k, count = options.distill.cache, mesh.rows_at_once(options.batch, options.micro_batch)
  files: tuple[np.ndarray, ...] = ()
  if is_first():
    files = _files(directory, len(rows), options.length, k, teacher.config.vocab_size, new=not done)

  def top(params: Params, tokens_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD = llama.hidden_states(teacher.config, params, tokens_BT, segments=segments_BT, dtype=dtype)
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    found = teacher_top(x_TD, llama.head(params), k, options.distill.temperature)
    ids, log_p = (x.reshape(*tokens_BT.shape, -1) for x in found)
    return ids, jnp.maximum(log_p, _LOWEST)

  program = None
  with Progress('teacher', (len(rows) - done) * options.length, 'tokens') as progress:
    for start in range(done, len(rows), count):
      some = rows[start : start + count]
      padded = np.pad(some, (0, count - len(some)), mode='edge')  # the last ones: one shape, one program
      tokens, _, segments = mesh.put_rows(padded, data.read)
      if program is None:
        program = compiler('teacher', top, teacher.params, tokens, segments)
      found = multihost_utils.process_allgather(program(teacher.params, tokens, segments), tiled=True)
      for file, values in zip(files, found, strict=False):
        file[start : start + len(some)] = values[: len(some)]
      if is_first():
        _write_done(directory, start + len(some), files)
      progress.update(len(some) * options.length)
      preemption.check()
  decide(lambda: 0)  # all wait until the last is written


def _files(
  directory: pathlib.Path, rows: int, length: int, k: int, vocab_size: int, *, new: bool
) -> tuple[np.ndarray, ...]:
  directory.mkdir(parents=True, exist_ok=True)
  ids = np.uint16 if vocab_size <= 2**16 else np.uint32
  wanted: dict[str, tuple[int, Any]] = {'ids': (k, ids), 'log_p': (k + 1, np.float16)}
  return tuple(
    np.lib.format.open_memmap(
      directory / f'{name}.npy',
      mode='w+' if new else 'r+',
      dtype=dtype if new else None,
      shape=(rows, length, width) if new else None,
    )
    for name, (width, dtype) in wanted.items()
  )


def _write_done(directory: pathlib.Path, count: int, files: tuple[np.ndarray, ...]) -> None:
  for file in files:
    assert isinstance(file, np.memmap)
    file.flush()
  write_text(directory / 'done', str(count))
