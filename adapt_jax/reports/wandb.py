"""Weights & Biases: one run for each workdir, with its settings and curves.

W&B's own environment variables apply: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline and so on.
"""

import os
import pathlib
import secrets
from collections.abc import Sequence
from typing import Any

from adapt_jax.machine.processes import say
from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.files import read_text, write_text
from adapt_jax.reports import trackers
from adapt_jax.reports.trackers import Row

_PROJECT = 'adapt-jax'  # unless WANDB_PROJECT names another


class Tracker:
  """A W&B run whose id stands in `wandb/id.txt` of the workdir, so that a resume continues it.

  W&B's own step is the line of the log: what W&B has already is not sent twice. Curves are over
  `train/step` and `prune/step`.
  """

  def __init__(self, workdir: pathlib.Path, settings: dict[str, Any], rows: Sequence[Row]):
    import wandb

    try:
      self._run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', _PROJECT),
        name=workdir.resolve().name,
        id=_run_id(workdir),
        resume='allow',
        dir=workdir,
        config=settings,
        settings=wandb.Settings(console='off', silent=True),
      )
    except wandb.Error as error:
      raise InputError(
        f'tracker: W&B does not start ({first_line(error)}): run `wandb login`, set '
        f'WANDB_MODE=offline, or leave wandb out'
      ) from None
    for group, tags in (('train', ('train/*', 'perplexity/*')), ('prune', ('prune/*',))):
      for tag in tags:
        self._run.define_metric(tag, step_metric=f'{group}/step')
    if not self._run.offline:
      say(f'W&B shows this run at {self._run.url}')
    self._line, known = 0, self._run.step  # lines that W&B has, if it was reached
    for row in rows:
      self._add(row, known)

  def write(self, row: Row) -> None:
    """Adds the log's next line."""
    self._add(row, 0)

  def close(self) -> None:
    """Uploads what is left; offline, `wandb sync` can upload it later."""
    self._run.finish()

  def _add(self, row: Row, known: int) -> None:
    if (values := trackers.scalars(row)) and self._line >= known:
      axis = 'prune' if row['event'] == 'prune' else 'train'
      self._run.log(values | {f'{axis}/step': row['step']}, step=self._line)
    self._line += 1


def _run_id(workdir: pathlib.Path) -> str:
  """The id of the workdir's W&B run, made on its first start."""
  path = workdir / 'wandb' / 'id.txt'
  if not path.exists():
    path.parent.mkdir(exist_ok=True)
    write_text(path, secrets.token_hex(4) + '\n')
  return read_text(path).strip()
