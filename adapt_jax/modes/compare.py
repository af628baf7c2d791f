"""Mode compare: a grid over config fields on one model; every cell is a run of its own, in one process.

A cell's directory WORKDIR/cells/NAME is that of a run of mode prune or accel, without weights. Finished cells
are skipped, so a grid that was killed, or extended, continues with the rest.
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

from adapt_jax.config.build import from_dict
from adapt_jax.config.identity import PRUNING, TRAINING, settings
from adapt_jax.config.mode_options import CompareOptions
from adapt_jax.config.options import ExportOptions, RunOptions
from adapt_jax.config.values import plain
from adapt_jax.evaluation.harness import check_tasks
from adapt_jax.machine import preemption
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError, disk_full, first_line, reading, write_denied
from adapt_jax.models.files import write_text
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.modes import accel, compare_grid
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.checks import check_run, check_sources
from adapt_jax.pipeline.inputs import Inputs, load
from adapt_jax.pipeline.loader import Loader
from adapt_jax.pipeline.quality import dense_key
from adapt_jax.pipeline.shared import Shared
from adapt_jax.pipeline.slice_run import run_class
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.serving_widths import aligned
from adapt_jax.reports import compare_page, compare_tables, trackers
from adapt_jax.reports.report import (
  CellReport,
  ComparisonReport,
  RunReport,
  read_report,
  versions,
  write_report,
)

CELLS, ERROR = 'cells', 'error.txt'
# Fields that a grid cannot vary: cells share model, devices and trackers.
_SHARED = ('model.source', 'mesh.', 'tracker')
# Fields that cells read, but that change nothing in their reports.
_WITHOUT_EFFECT = ('export.formats', 'export.gguf_types', 'export.push', 'data.cache')


@dataclasses.dataclass(frozen=True)
class CellRun:
  """A cell with the options and the directory of its run."""

  cell: compare_grid.Cell
  options: RunOptions
  workdir: Workdir

  @property
  def finished(self) -> bool:
    return self.workdir.report.exists()


@contextlib.contextmanager
def _named(cell: compare_grid.Cell) -> Iterator[None]:
  """Prefixes an InputError with the cell's name."""
  try:
    yield
  except InputError as error:
    raise type(error)(f'cell {cell.label}: {error}') from None


def list_cells(options: RunOptions, workdir: Workdir) -> list[CellRun]:
  """All cells in the order to run them, with checked options; opens nothing. Raises InputError."""
  base = dataclasses.asdict(dataclasses.replace(options, compare=CompareOptions()))
  base['export'] = dataclasses.asdict(ExportOptions(dtype=options.export.dtype))  # cells write no weights
  if not options.compare.recover:
    base['train']['tokens'] = 0
  if 'evaluate.health' not in compare_grid.fields(options.compare.grid):
    base['evaluate']['health'] = False
  cells, runs = compare_grid.expand(options.compare.grid, base), []
  _check(options)
  for cell in cells:
    with _named(cell):
      of_cell = aligned(from_dict(compare_grid.assign(base, cell.values)))
      if not of_cell.evaluate.source:
        raise InputError('evaluate.source is empty, but mode compare measures perplexity: name a text')
    mode = accel.ACCEL if of_cell.train.tokens else accel.PRUNE
    place = str(workdir.path / CELLS / cell.name)
    runs.append(CellRun(cell, of_cell, Workdir(place, mode.identity(of_cell))))
  return runs


def _check(options: RunOptions) -> None:
  fields, recover = compare_grid.fields(options.compare.grid), options.compare.recover
  if not fields:
    raise InputError('compare.grid is empty: name fields and their values, as configs/ablations.py does')
  for field in fields:
    unread = field in _WITHOUT_EFFECT or not (accel.ACCEL if recover else accel.PRUNE).uses(field)
    if field.startswith(_SHARED) or unread:
      why = 'changes nothing in a cell' if unread else 'all cells of a grid share'
      raise InputError(f'compare.grid varies {field!r}, which {why}: leave it out')
  if recover and not options.train.tokens and 'train.tokens' not in fields:
    raise InputError('train.tokens = 0, but compare.recover = True trains every cell: set it')


def open_inputs(runs: list[CellRun], source: Source) -> list[Inputs]:
  """Opens and checks the cells' inputs; a text that several use is tokenised once. Raises InputError."""
  for run in runs:
    with _named(run.cell):
      run.workdir.check()
      check_sources(run.options)
      check_tasks(run.options.evaluate)
      check_run(run.options, source.config, source.dtype)
  own, inputs = (source, source.load_tokenizer(), dict[Any, Any]()), []
  for run in runs:
    with _named(run.cell):
      inputs.append(load(run.options, source, Loader(run.options, *own)))
  return inputs


def _check_same_inputs(finished: list[CellRun], todo: list[CellRun], inputs: list[Inputs]) -> None:
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


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Mode compare: runs the unfinished cells, writes the report in all formats, prints the table.

  Exits with code 1 if any cell failed.
  """
  trackers.check(options.tracker)
  runs = list_cells(options, workdir)
  source = open_source(options.model.source)
  finished, todo = [run for run in runs if run.finished], [run for run in runs if not run.finished]
  for run in finished:
    with _named(run.cell):
      run.workdir.check()
  inputs = open_inputs(todo, source)
  _check_same_inputs(finished, todo, inputs)
  with workdir.claimed():
    compare = Compare(options, runs, source, workdir, command)
    report = compare.execute(todo, inputs)
    print(compare_tables.text(report))
    print(f'report with plots: {workdir.page}')
    if failed := [cell for cell in report['cells'] if cell['state'] == 'failed']:
      raise SystemExit(
        f'error: {len(failed)} of {len(runs)} cells failed: {failed[0]["error"]}; all reasons are in '
        f'{workdir.path / compare_page.MARKDOWN}; run the same command to retry them'
      )


@dataclasses.dataclass
class Compare:
  """A grid in its claimed workdir; command: that which reproduces it."""

  options: RunOptions
  runs: list[CellRun]  # from `list_cells`
  source: Source
  workdir: Workdir
  command: str
  shared: Shared = dataclasses.field(default_factory=Shared)

  def execute(self, todo: list[CellRun], inputs: list[Inputs]) -> ComparisonReport:
    """Runs the cells `todo` on their `inputs`, rewrites the report after each, and returns it."""
    for run in self.runs:
      if run.finished:
        _clean(run)
        key, measured = dense_key(run.options), _read(run)[1]
        self.shared.dense[key] = {name: text['dense'] for name, text in measured['texts'].items()}
        if 'dense' in measured['tasks']:
          self.shared.tasks[key] = measured['tasks']['dense']
    if len(todo) < len(self.runs):
      print(f'{len(self.runs) - len(todo)} of {len(self.runs)} cells are finished', flush=True)
    if todo:
      self.workdir.report.unlink(missing_ok=True)  # the report of a smaller grid
    for number, (run, of_run) in enumerate(zip(todo, inputs, strict=True), 1):
      preemption.check()
      compare_page.write(self.workdir.path, self._report(run), running=True)
      print(f'cell {number} of {len(todo)}: {run.cell.label}', flush=True)
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
        one = make(run.options, inputs, run.workdir, command, shared=self.shared, export=False)
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
    _clean(run)
    return ''

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
        definitions[str(report['perplexity']['definition'])] = None
        compiles.update(report['compiles'])
      else:
        cells.append(_unfinished(run, running=run is now))
    o, scores = self.options.compare, self.shared.scores
    return {
      'model': {'source': self.source.name, 'params_before': count_params(self.source.config)},
      'fields': compare_grid.fields(o.grid),
      'over': o.over,
      'recover': o.recover,
      'cells': cells,
      'definitions': list(definitions),
      # Since this process started; a remembered pass was computed by another cell.
      'scoring_passes': {'computed': scores.computed, 'remembered': scores.remembered},
      'compiles': dict(compiles),
      'seconds': sum(cell.get('seconds', 0.0) for cell in cells),
      'command': self.command,
      'versions': versions(),
    }


def _clean(run: CellRun) -> None:
  """Deletes a finished cell's checkpoints and teacher cache, which would fill the disk; keeps reports."""
  for directory in (run.workdir.checkpoints, run.workdir.teacher):
    shutil.rmtree(directory, ignore_errors=True)


def _read(run: CellRun) -> tuple[CellReport, RunReport]:
  """A finished cell's entry in the report, and its own report. Raises InputError if that is damaged."""
  with reading('the report of a finished cell', run.workdir.report, 'delete its directory to run it again'):
    report = read_report(run.workdir.report)
    cell: CellReport = {'name': run.cell.name, 'values': run.cell.values, 'state': 'finished'}
    cell |= {
      'texts': report['texts'],
      'params': report['model']['params_after'],
      'seconds': report['seconds'],
    }
    compare_tables.figures(cell)
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


class _Compare(Mode):
  """Cells that are only pruned do not depend on the options of training."""

  def identity(self, options: RunOptions) -> dict[str, Any]:
    result = TRAINING if options.compare.recover else PRUNING
    return {'mode': self.name, 'config': settings(options, (*result, 'compare.recover'))}


# The grid and its plots are no part of the result: each cell is a run with its own identity.
MODE = _Compare(
  'compare',
  'run a grid over options',
  run,
  result=(*TRAINING, 'compare.recover'),
  reads=('compare', 'mesh', 'tracker'),
  grows=True,
)
