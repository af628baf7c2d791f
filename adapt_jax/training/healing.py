"""Healing: pruning ends with distillation on its own calibration rows (docs/methods.md).

The dense model is asked once, before pruning, for its most likely ids on each token of the rows. The pruned
model then learns them in a few steps, so this needs no other text and no teacher in memory.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adapt_jax.config.options import DistillOptions, TrainOptions
from adapt_jax.data.train_set import BlockRows, TrainSet
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import bytes_of
from adapt_jax.machine.processes import decide
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.sharding import row_shards
from adapt_jax.training import rate
from adapt_jax.training.loop import Diverged, Trained, recover_model
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import Teacher, begin
from adapt_jax.training.teacher_cache import predictions

_KEPT = 64  # ids of the dense model for each token


def heal_options(
  samples: int, length: int, passes: int, micro_batch: int, vocab_size: int, moments_dtype: str
) -> TrainOptions:
  """The training of `passes` over `samples` rows; its learning rate is still to follow from the weights.

  A step takes as many tokens as the learning rate was tuned for, or one row per device.
  """
  shards = row_shards()
  batch = min(samples, shards * max(1, rate.TOKENS // (length * shards)))
  return TrainOptions(
    tokens=max(1, passes * samples // batch) * batch * length,
    batch=batch,
    micro_batch=micro_batch,
    length=length,
    layout='padded',  # a row is one document
    schedule='cosine',
    save_every=10**9,
    moments_dtype=moments_dtype,
    distill=DistillOptions(alpha=1.0, cache=min(_KEPT, vocab_size - 1)),
  )


# Ids [S, T, k] that the dense model finds most likely, and their log p and that of all others, [S, T, k + 1].
Told = tuple[np.ndarray, np.ndarray]


class _Taught:
  """Calibration rows with what the dense model says on them, in memory."""

  def __init__(self, data: TrainSet, told: Told):
    self._data, self.rows = data, data.rows
    self._ids, self._log_p = told

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    told = self._ids[rows].astype(np.int32), self._log_p[rows].astype(np.float32)
    return (*self._data.read(rows), *told)


def _ask(data: TrainSet, options: TrainOptions, dense: Teacher, **common: Any) -> Told:
  """What the dense model says on all rows."""
  k = options.distill.cache
  ids = np.zeros((len(data), options.length, k), np.uint32)
  log_p = np.zeros((len(data), options.length, k + 1), np.float16)
  for rows, *told in predictions(data, options, np.arange(len(data)), dense, **common):
    ids[rows], log_p[rows] = told
  return ids, log_p


class Healing:
  """Distils a pruned model on calibration rows, from the dense model's predictions on them.

  Args:
    tokens: the rows, token ids [S, T]; all of them count, also those of a user in a chat, as in scoring.
    passes: over the rows. micro_batch: rows on a device at once.
    moments_dtype: as in `TrainOptions`.
    dense: config and parameters of the dense model, which are not kept.
    stored: its parameters as they are stored; their size decides the learning rate.
    dtype: of activations and products. compiler: counts compiles as `teacher` and `healing`.
    known: what the same dense model has said, by what it depends on; the last is kept there.

  Raises `Preempted` after SIGTERM.
  """

  def __init__(
    self,
    tokens: np.ndarray,
    passes: int,
    dense: Teacher,
    stored: Mapping[str, Any],
    *,
    micro_batch: int,
    seed: int,
    dtype: Any,
    compiler: Compiler,
    known: dict[Any, Told] | None = None,
    moments_dtype: str = 'float32',
  ):
    vocab_size, (samples, length) = dense.config.vocab_size, tokens.shape
    options = heal_options(samples, length, passes, micro_batch, vocab_size, moments_dtype)
    lr = decide(lambda: rate.with_rate(options, stored).lr)
    self._options = dataclasses.replace(options, lr=lr)
    self._dtype, self._compiler = dtype, compiler
    rows = BlockRows(tokens, vocab_size, 'prune.calibration.source')
    data = TrainSet([rows], [1.0], length=options.length, batch=options.batch, seed=seed)
    known, key = {} if known is None else known, (dense.config, options, dtype, tokens.tobytes())
    if key not in known:
      told = _ask(data, options, dense, dtype=dtype, compiler=compiler)
      known.clear()
      known[key] = told
    self._data = _Taught(data, known[key])

  def heal(
    self,
    config: ModelConfig,
    arrays: dict[str, Any],
    title: str = 'heal',
    after_step: Callable[[Trained], None] = lambda done: None,
  ) -> None:
    """Replaces arrays['params'] by the healed ones, in fp32; `after_step` is called after each step.

    The old ones are taken out at once, so that nobody holds them beside the copy that is trained. The size of
    the other arrays counts where remat is chosen; measured, a repetition might differ. Raises InputError if
    it diverges.
    """
    options = self._options
    steps = options.tokens // (options.batch * options.length)
    tx = optimizer(options, steps)
    state = begin(arrays.pop('params'), tx)
    common: dict[str, Any] = {'dtype': self._dtype, 'compiler': self._compiler, 'title': title}
    common['beside'] = bytes_of(arrays)
    taken = recover_model(
      config, state, self._data, options, tx, stop=steps, total=steps, name='healing', **common
    )
    del state  # donated
    try:
      for done in taken:
        after_step(done)
    except Diverged:
      raise Diverged('healing the pruned model diverges: set prune.heal = 0, in a new workdir') from None
    assert done.state is not None
    arrays['params'] = done.state['params']
