"""Runs of one process on one model, each in its own directory: the cells of a grid, or the sizes of a run.

They share what each would compute alike: tokenised texts, programs, the dense model's figures, scores.
Finished ones are skipped, so what was killed continues with the rest.
"""

import collections
import contextlib
import dataclasses
import gc
import shlex
import shutil
import traceback
from collections.abc import Iterator
from typing import Any

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import OWN, plain
from adapt_jax.evaluation.harness import check_tasks
from adapt_jax.machine import preemption
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError, disk_full, first_line, reading, write_denied
from adapt_jax.models.files import write_text
from adapt_jax.models.formats.source import Source
from adapt_jax.modes.compare_grid import Cell
from adapt_jax.pipeline.checks import check_run, check_sources, fit_memory
from adapt_jax.pipeline.inputs import Inputs, load, warn_without_chats
from adapt_jax.pipeline.loader import Loader
from adapt_jax.pipeline.quality import dense_key
from adapt_jax.pipeline.shared import Shared
from adapt_jax.pipeline.slice_run import run_class
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import compare_page, compare_tables
from adapt_jax.reports.report import (
  CellReport,
  ComparisonReport,
  RunReport,
  read_report,
  versions,
  write_report,
)

ERROR = 'error.txt'


@dataclasses.dataclass(frozen=True)
class CellRun:
  """A cell with the options and the directory of its run."""

  cell: Cell
  options: RunOptions
  workdir: Workdir

  @property
  def finished(self) -> bool:
    return self.workdir.report.exists()


@contextlib.contextmanager
def named(cell: Cell) -> Iterator[None]:
  """Prefixes an InputError with the cell's values."""
  try:
    yield
  except InputError as error:
    raise type(error)(f'{cell.label}: {error}') from None


def open_inputs(runs: list[CellRun], source: Source) -> list[Inputs]:
  """Opens and checks the cells' inputs; a text that several use is tokenised once. Raises InputError."""
  for run in runs:
    with named(run.cell):
      run.workdir.check()
      check_sources(run.options)
      check_tasks(run.options.evaluate)
      check_run(run.options, source.config, source.dtype)
      fit_memory(run.options, source.config)
  own, inputs = (source, source.load_tokenizer(), dict[Any, Any]()), []
  for run in runs:
    with named(run.cell):
      inputs.append(load(run.options, source, Loader(run.options, *own)))
  return inputs


def check_same_inputs(finished: list[CellRun], todo: list[CellRun], inputs: list[Inputs]) -> None:
  """Raises InputError if the model or a text has changed since a cell with the same options for it ended."""

  def key(field: str, options: RunOptions) -> Any:
    if field == 'model.source':  # that of all cells
      return field
    train, calibration = options.train, options.prune.calibration
    drawn = {'prune.calibration.source': calibration, 'train.source': train, 'train.distill.source': train}
    own = (drawn[field], options.seed) if field in drawn else options.evaluate
    return field, options.model, options.data, own

  known = {
    key(field, run.options): (digest, run.cell)
    for run in finished
    for field, digest in run.workdir.texts().items()
  }
  for run, found in zip(todo, inputs, strict=True):
    for field, digest in found.digests().items() if known else ():
      before, cell = known.get(key(field, run.options), (digest, run.cell))
      if before != digest and field != 'prune.latency_table':
        raise InputError(
          f'{field} is not what the finished cell {cell.label} was run with, so their figures cannot '
          f'be compared: restore it, or use another workdir'
        )


def run(cells: 'Cells') -> None:
  """Runs the unfinished cells, writes the report in all formats, prints the table.

  Exits with code 1 if any cell failed. Raises InputError.
  """
  finished = [run for run in cells.runs if run.finished]
  todo = [run for run in cells.runs if not run.finished]
  for run in finished:
    with named(run.cell):
      run.workdir.check()
  inputs = open_inputs(todo, cells.source)
  check_same_inputs(finished, todo, inputs)
  if cells.export and inputs:
    warn_without_chats(todo[0].options, inputs[0])
  with cells.workdir.claimed():
    report = cells.execute(todo, inputs)
    print(compare_tables.text(report))
    print(f'report with plots: {cells.workdir.page}')
    if failed := [cell for cell in report['cells'] if cell['state'] == 'failed']:
      raise SystemExit(
        f'error: {len(failed)} of {len(cells.runs)} {cells.of} failed: {failed[0]["error"]}; all reasons are '
        f'in {cells.workdir.path / compare_page.MARKDOWN}; run the same command to retry them'
      )


@dataclasses.dataclass
class Cells:
  """Cells in their workdir.

  of: what they are called, and the directory that has theirs: cells or sizes. fields: the options that vary.
  command: that which reproduces all. over, recover: as in `CompareOptions`. export: whether they write
  models.
  """

  of: str
  fields: list[str]
  runs: list[CellRun]
  source: Source
  workdir: Workdir
  command: str
  over: str = 'seed'
  recover: bool = False
  export: bool = False
  shared: Shared = dataclasses.field(default_factory=Shared)

  def execute(self, todo: list[CellRun], inputs: list[Inputs]) -> ComparisonReport:
    """Runs the cells `todo` on their `inputs`, rewrites the report after each, and returns it."""
    for run in self.runs:
      if run.finished:
        self._clean(run)
        key, measured = dense_key(run.options), _read(run)[1]
        known = {name: text['dense'] for name, text in measured['texts'].items() if 'dense' in text}
        evaluate = run.options.evaluate
        if {*evaluate.texts, *([OWN] if evaluate.health else [])} <= known.keys():
          self.shared.dense[key] = known
        if 'dense' in measured['tasks']:
          self.shared.tasks[key] = measured['tasks']['dense']
    if len(todo) < len(self.runs):
      print(f'{len(self.runs) - len(todo)} of {len(self.runs)} {self.of} are finished', flush=True)
    if todo:
      self.workdir.report.unlink(missing_ok=True)  # the report of a smaller grid
    for number, (run, of_run) in enumerate(zip(todo, inputs, strict=True), 1):
      preemption.check()
      compare_page.write(self.workdir.path, self._report(run), running=True)
      print(f'{self.of[:-1]} {number} of {len(todo)}: {run.cell.label}', flush=True)
      if reason := self._try(run, of_run):
        print(f'failed: {reason}', flush=True)
      gc.collect()  # reference cycles of a run keep its model in memory
    report = self._report()
    compare_page.write(self.workdir.path, report, running=False)
    if all(cell['state'] == 'finished' for cell in report['cells']):
      write_report(self.workdir.report, report)
    return report

  def _try(self, run: CellRun, inputs: Inputs) -> str:
    """Runs one cell; returns the reason if it failed, also written to its error file, else ''."""
    error_file = run.workdir.path / ERROR
    try:
      with run.workdir.claimed(inputs.digests):
        make, command = run_class(run.options), self._alone(run)
        one = make(run.options, inputs, run.workdir, command, shared=self.shared, export=self.export)
        with contextlib.closing(one):
          one.execute()
    except Exception as error:  # a failed cell must not stop the others; a full disk affects all
      if disk_full(error) or write_denied(error, str(run.workdir.path)):
        raise
      known = isinstance(error, InputError)
      reason = first_line(error) if known else f'{type(error).__name__}: {first_line(error)}'
      details = '' if known else '\n' + traceback.format_exc()
      run.workdir.path.mkdir(parents=True, exist_ok=True)
      write_text(error_file, f'{reason}\n{details}')
      return reason
    error_file.unlink(missing_ok=True)
    self._clean(run)
    return ''

  def _clean(self, run: CellRun) -> None:
    """Deletes a finished cell's checkpoints and teacher cache, which would fill the disk."""
    only = self.export and 'hf' not in run.options.export.formats  # no other file has the weights as they are
    for directory in (*([] if only else [run.workdir.checkpoints]), run.workdir.teacher):
      shutil.rmtree(directory, ignore_errors=True)

  def _alone(self, run: CellRun) -> str:
    """The command that runs only this cell; the last of repeated flags takes effect."""
    values = {f'config.{field}': plain(value) for field, value in run.cell.values.items()}
    mode = 'accel' if run.options.train.tokens else 'prune'
    flags = {'mode': mode, 'workdir': f'out/{run.cell.name}'} | values
    return f'{self.command} {shlex.join(f"--{name}={value}" for name, value in flags.items())}'

  def _report(self, now: CellRun | None = None) -> ComparisonReport:
    """The contents of report.json, during the grid as far as the cells have run. now: the running cell."""
    cells, definitions, compiles = [], dict[str, None](), collections.Counter[str]()
    for run in self.runs:
      if run.finished:
        cell, report = _read(run)
        cells.append(cell)
        if definition := report['perplexity']['definition']:
          definitions[definition] = None
        compiles.update(report['compiles'])
      else:
        cells.append(_unfinished(run, running=run is now))
    scores = self.shared.scores
    return {
      'of': self.of,
      'model': {'source': self.source.name, 'params_before': count_params(self.source.config)},
      'fields': self.fields,
      'over': self.over,
      'recover': self.recover,
      'cells': cells,
      'definitions': list(definitions),
      # Since this process started; a remembered pass was computed by another cell.
      'scoring_passes': {'computed': scores.computed, 'remembered': scores.remembered},
      'compiles': dict(compiles),
      'seconds': sum(cell.get('seconds', 0.0) for cell in cells),
      'command': self.command,
      'versions': versions(),
    }


def _read(run: CellRun) -> tuple[CellReport, RunReport]:
  """A finished cell's entry in the report, and its own report. Raises InputError if that is damaged."""
  with reading('the report of a finished cell', run.workdir.report, 'delete its directory to run it again'):
    report = read_report(run.workdir.report)
    cell: CellReport = {'name': run.cell.name, 'values': run.cell.values, 'state': 'finished'}
    cell |= {
      'texts': report['texts'],
      'params': report['model']['params_after'],
      'seconds': report['seconds'],
      'version': report['versions'].get('adapt-jax', ''),
    }
    compare_tables.figures(cell)
    if exports := report.get('exports'):
      cell |= {'budget': report['budget'], 'bytes': next(iter(exports.values()))['bytes']}
      before, after = (report['gain'][of].get('decode') for of in ('dense', 'result'))
      if before and after:
        cell['faster'] = after / before
      if 'usable' in (health := report.get('health', {})).get('result', {}):
        cell |= {'usable': health['result']['usable'], 'usable_dense': health['dense']['usable']}
    _ = report['tasks'].keys(), report['compiles'].items(), report['perplexity']['definition']
  return cell, report


def _unfinished(run: CellRun, *, running: bool) -> CellReport:
  """The entry of a cell that waits, runs or has failed."""
  cell: CellReport = {'name': run.cell.name, 'values': run.cell.values, 'state': 'waiting'}
  error_file = run.workdir.path / ERROR
  if running or not error_file.exists():
    return {**cell, 'state': 'running' if running else 'waiting'}
  lines = error_file.read_text(errors='replace').splitlines()
  return {**cell, 'state': 'failed', 'error': next(iter(lines), 'unknown')}
