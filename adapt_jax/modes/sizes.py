"""Several targets in one run of mode prune or accel: each size is a run of its own in WORKDIR/sizes/NAME.

A size has its checkpoints, exports and report, and the bits of a run for it alone.
"""

import dataclasses
import shlex

from adapt_jax.config.identity import PRUNING, TRAINING, settings
from adapt_jax.config.options import RunOptions
from adapt_jax.config.targets import listed, parse
from adapt_jax.machine import processes
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import cells
from adapt_jax.modes.cells import CellRun
from adapt_jax.modes.compare_grid import Cell
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import slicegpt

SIZES = 'sizes'
_FIELD = 'prune.target'


def of_each(options: RunOptions) -> list[RunOptions]:
  """The options of each size, as for a run of it alone."""
  return [
    dataclasses.replace(options, prune=dataclasses.replace(options.prune, target=target))
    for target in listed(options.prune.target)
  ]


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Runs the unfinished sizes, writes the report over all, prints the table. Raises InputError."""
  if processes.count() > 1:
    raise InputError(f'{_FIELD} names several sizes, which run in one process: start one run for each size')
  mode, result = ('accel', TRAINING) if options.train.tokens else ('prune', PRUNING)
  runs = []
  for of_size in of_each(options):
    target = of_size.prune.target
    cell = Cell({_FIELD: target}, parse(target).name)
    place = str(workdir.path / SIZES / cell.name)
    identity = {'mode': mode, 'config': settings(of_size, result)}
    runs.append(CellRun(cell, with_file(of_size), Workdir(place, identity)))
  trains, source = options.train.tokens > 0, open_source(options.model.source)
  cells.run(cells.Cells(SIZES, [_FIELD], runs, source, workdir, command, recover=trains, export=True))
  sliced = options.prune.method == slicegpt.METHOD
  if sliced or not options.evaluate.source or 'hf' not in options.export.formats:
    return  # mode frontier reads hf/, and measures on a text
  flags = {'mode': 'frontier', 'workdir': f'{workdir.path}/frontier', 'config.frontier.models': workdir.path}
  beside = shlex.join(f'--{name}={value}' for name, value in flags.items())
  print(f'Compare them with quantised files, by llama.cpp (docs/which-size.md):\n{command} {beside}')


def with_file(options: RunOptions) -> RunOptions:
  """The options with the GGUF file that the target counts among the exports."""
  kind, export = options.prune.limit.type, options.export
  types = export.gguf_types if any(name.startswith('gguf') for name in export.formats) else ()
  if not kind or ('gguf' in export.formats and kind in types):
    return options
  formats = tuple(dict.fromkeys((*export.formats, 'gguf')))
  types = tuple(dict.fromkeys((*types, kind)))
  return dataclasses.replace(options, export=dataclasses.replace(export, formats=formats, gguf_types=types))
