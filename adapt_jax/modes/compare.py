"""Mode compare: a grid over config fields on one model; every cell is a run of its own, in one process.

A cell's directory WORKDIR/cells/NAME is that of a run of mode prune or accel, without weights. Finished cells
are skipped, so a grid that was killed, or extended, continues with the rest.
"""

import dataclasses
from typing import Any

from adapt_jax.config.build import from_dict
from adapt_jax.config.identity import PRUNING, TRAINING, settings
from adapt_jax.config.mode_options import CompareOptions
from adapt_jax.config.options import ExportOptions, RunOptions
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import accel, cells, compare_grid
from adapt_jax.modes.cells import CellRun, named
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.serving_widths import aligned
from adapt_jax.reports import trackers

CELLS = 'cells'
# Fields that a grid cannot vary: cells share model, devices and trackers.
_SHARED = ('model.source', 'mesh.', 'tracker')
# Fields that cells read, but that change nothing in their reports.
_WITHOUT_EFFECT = ('export.formats', 'export.gguf_types', 'export.push', 'data.cache')


def list_cells(options: RunOptions, workdir: Workdir) -> list[CellRun]:
  """All cells in the order to run them, with checked options; opens nothing. Raises InputError."""
  base = dataclasses.asdict(dataclasses.replace(options, compare=CompareOptions()))
  base['export'] = dataclasses.asdict(ExportOptions(dtype=options.export.dtype))  # cells write no weights
  if not options.compare.recover:
    base['train']['tokens'] = 0
  if 'evaluate.health' not in compare_grid.fields(options.compare.grid):
    base['evaluate']['health'] = False
  runs = list[CellRun]()
  _check(options)
  for cell in compare_grid.expand(options.compare.grid, base):
    with named(cell):
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


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Mode compare: `cells.run` on the grid."""
  trackers.check(options.tracker)
  runs, o = list_cells(options, workdir), options.compare
  source = open_source(options.model.source)
  fields = compare_grid.fields(o.grid)
  cells.run(cells.Cells(CELLS, fields, runs, source, workdir, command, o.over, o.recover))


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
