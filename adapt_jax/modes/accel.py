"""Modes accel and prune: prunes a model in stages and, in mode accel, recovers it after each."""

import dataclasses

from adapt_jax.config.identity import PRUNING, TRAINING
from adapt_jax.config.options import RunOptions
from adapt_jax.evaluation.harness import check_tasks
from adapt_jax.export.push import check_hub, push
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.errors import InputError
from adapt_jax.modes import sizes
from adapt_jax.modes.last_lines import last_lines
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.slice_run import run_class
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import trackers
from adapt_jax.reports.summary import table


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Runs or resumes one size or several, then prints the table. Raises InputError before any work."""
  check_tasks(options.evaluate)
  decide(lambda: trackers.check(options.tracker))
  if isinstance(options.prune.target, tuple):
    sizes.run(options, workdir, command)
    return
  options = sizes.with_file(options)
  inputs = prepare(options)
  decide(lambda: check_hub(options.export))  # it creates repositories: last
  with workdir.claimed(inputs.digests):
    report = run_class(options)(options, inputs, workdir, command).execute()
    say(table(report))
    decide(lambda: push(options.export, workdir.path))
    for line in decide(lambda: last_lines(report, workdir.path, command)):
      say(line)


def _trains(options: RunOptions) -> RunOptions:
  if options.train.tokens == 0:
    raise InputError('train.tokens = 0, but mode accel trains: set it, or use --mode=prune')
  return options


def untrained(options: RunOptions) -> RunOptions:
  """The options for a mode that does not train, whatever the recipe says."""
  return dataclasses.replace(options, train=dataclasses.replace(options.train, tokens=0))


_ALSO = ('mesh', 'tracker')
ACCEL = Mode(
  'accel',
  'prune and recover in stages (the default)',
  run,
  result=TRAINING,
  reads=_ALSO,
  settle=_trains,
  several_processes=True,
)
PRUNE = Mode(
  'prune', 'prune and heal, without recovery', run, PRUNING, _ALSO, settle=untrained, several_processes=True
)
