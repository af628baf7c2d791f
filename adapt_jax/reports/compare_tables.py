"""Figures and tables of mode compare.

A group consists of the cells that differ only in the field `over` (usually the seed): a row of the table, a
point of a plot. Figures that vary within it are given as median (lowest–highest).
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from adapt_jax.config.values import plain
from adapt_jax.reports.report import CellReport, ComparisonReport, made
from adapt_jax.reports.summary import budget_lines, excess
from adapt_jax.reports.table import Table

Json = dict[str, Any]


def show(value: Any) -> str:
  """A value as readers see it: whole numbers from 10,000 on have commas, also where they are floats."""
  whole = is_number(value) and value >= 10_000 and value == int(value)
  return f'{value:,.0f}' if whole else plain(value)


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def short(fields: Sequence[str]) -> dict[str, str]:
  """Field -> its shortest suffix that is unique among `fields`: 'method', or 'calibration.source'."""

  def ends(field: str) -> list[str]:
    parts = field.split('.')
    return ['.'.join(parts[i:]) for i in reversed(range(len(parts)))]

  every = [end for field in fields for end in ends(field)]
  return {field: next((end for end in ends(field) if every.count(end) == 1), field) for field in fields}


# Figures of cells that write models -> title, form and scale in the table.
_OF_MODELS = {
  'bytes': ('MB', ',.1f', 1e-6),
  'faster': ('decode, x dense', '.2f', 1.0),
  'usable': ('answers', '.0f', 1.0),
}


def texts(report: ComparisonReport) -> dict[str, str]:
  """Name of each text that cells measure -> the words after a figure's name; '' if there is only one."""
  names = dict.fromkeys(name for cell in report['cells'] for name in cell.get('texts', {}))
  return {name: f' {name}' if len(names) > 1 else '' for name in names}


def _of_models(report: ComparisonReport) -> list[str]:
  """The figures of written models that some cell has."""
  return [name for name in _OF_MODELS if any(name in cell for cell in report['cells'])]


def figures(cell: CellReport) -> dict[str, float]:
  """The figures of a cell by name, such as 'excess web'; none before it is finished."""
  fields: dict[str, Any] = {**cell}
  known: dict[str, float] = {
    name: float(fields[name]) for name in ('params', *_OF_MODELS, 'usable_dense', 'seconds') if name in fields
  }
  for name, text in cell.get('texts', {}).items():
    values: dict[str, Any] = {'dense': text.get('dense'), 'excess': excess(text)}
    values |= {kind: text.get(kind) for kind in ('pruned', 'recovered', 'kl')}
    values['perplexity'] = text.get('recovered', text.get('pruned'))
    known |= {f'{kind} {name}': value for kind, value in values.items() if value is not None}
  return known


def groups(report: ComparisonReport) -> list[Json]:
  """Each group: its values, the numbers of cells, finished and failed, and the cells' figures.

  figures: [median, lowest, highest] by name, of the finished cells.
  """
  members: dict[str, list[CellReport]] = {}
  for cell in report['cells']:
    values = {field: value for field, value in cell['values'].items() if field != report['over']}
    members.setdefault(json.dumps(values), []).append(cell)
  found = []
  for key, cells in members.items():
    all_figures: dict[str, list[float]] = {}
    for cell in cells:
      for name, value in figures(cell).items():
        all_figures.setdefault(name, []).append(value)
    counts = {state: sum(cell['state'] == state for cell in cells) for state in ('finished', 'failed')}
    spreads = {name: [statistics.median(x), min(x), max(x)] for name, x in all_figures.items()}
    found.append({'values': json.loads(key), 'cells': len(cells), 'figures': spreads} | counts)
  return found


def spread(group: Json, figure: str, form: str, scale: float = 1.0) -> str:
  """'12.34 (12.01–12.90)', '12.34' if nothing varies, or '–' if the figure is not known."""
  if figure not in group['figures']:
    return '–'
  middle, low, high = (format(scale * value, form) for value in group['figures'][figure])
  return middle if low == high else f'{middle} ({low}–{high})'


# Figures on a text -> title and form in the tables.
_ON_TEXTS = {
  'excess': ('Loss increase', '.3f'),
  'kl': ('KL', '.3f'),
  'pruned': ('Perplexity pruned', ',.2f'),
  'recovered': ('Perplexity recovered', ',.2f'),
}


def tables(report: ComparisonReport) -> dict[str, Table]:
  """Title -> table with a row for each group: what the models cost, and what they lost.

  With several texts, each figure has a table with a column for each text: few columns, for narrow screens.
  """
  names, dense = list(texts(report)), report['model']['params_before']
  costs = [('params', 'parameters', ',.0f', 1.0), ('params', 'of dense, %', '.1f', 100 / dense)]
  costs += [(name, *_OF_MODELS[name]) for name in _of_models(report)]
  costs.append(('seconds', 'seconds', ',.0f', 1.0))
  shown = {report['of'].capitalize(): _table(report, costs)}
  kinds = {kind: of for kind, of in _ON_TEXTS.items() if kind != 'recovered' or report['recover']}
  if len(names) == 1:
    columns = [(f'{kind} {names[0]}', title, form, 1.0) for kind, (title, form) in kinds.items()]
    return shown | {'Loss': _table(report, columns)}
  for kind, (title, form) in kinds.items() if names else ():
    shown[title] = _table(report, [(f'{kind} {name}', name, form, 1.0) for name in names])
  return shown


def _table(report: ComparisonReport, columns: Sequence[tuple[str, str, str, float]]) -> Table:
  """A row for each group, and how many of its cells are finished if that says anything.

  columns: figure, title, form, scale.
  """
  names, found = short(report['fields']), groups(report)
  fields = [field for field in report['fields'] if field != report['over']]
  counted = any(group['finished'] != 1 or group['cells'] != 1 for group in found)
  rows = []
  for group in found:
    row = [show(group['values'][field]) for field in fields]
    row += [spread(group, figure, form, scale) for figure, _, form, scale in columns]
    failed = f', {group["failed"]} failed' if group['failed'] else ''
    rows.append([*row, *[f'{group["finished"]} of {group["cells"]}{failed}'] * counted])
  titles = [title for _, title, *_ in columns] + [report['of']] * counted
  return Table([*(names[f] for f in fields), *titles], rows)


def dense_perplexity(report: ComparisonReport, text: str) -> list[float]:
  """The dense model's perplexities on a text: one, unless the grid varies the texts."""
  known = [figures(cell).get(f'dense {text}') for cell in report['cells']]
  return list(dict.fromkeys(value for value in known if value is not None))


def notes(report: ComparisonReport) -> Iterator[str]:
  """What the figures mean, in sentences."""
  kind = 'recovered' if report['recover'] else 'pruned'
  measured = [
    (word, value) for name, word in texts(report).items() for value in dense_perplexity(report, name)
  ]
  dense = ', '.join(f'{word} {value:.2f}'.strip() for word, value in measured) or 'not measured yet'
  yield f'The dense model has {report["model"]["params_before"]:,} parameters and perplexity {dense}.'
  for usable in {cell['usable_dense'] for cell in report['cells'] if 'usable_dense' in cell}:
    yield f'Answers are the usable ones of 40. The dense model has {usable}.'
  yield (
    f'Loss increase is ln(perplexity {kind} / dense), and KL is that from the dense model; nats per token.'
  )
  if report['definitions']:
    yield f'Perplexity is {"; or ".join(report["definitions"])}.'
  if any(group['cells'] > 1 for group in groups(report)):
    yield f'Where {report["over"]} varies: median (lowest–highest) over its values.'
  for cell in report['cells']:
    if 'budget' in cell:
      yield f'{cell["name"]}: {"; ".join(budget_lines(cell["budget"]))}.'
  passes = report['scoring_passes']
  yield (
    f'{report["of"].capitalize()} share scoring passes and programs; the time of each counts for the first '
    f'that needs it. '
    f'Scoring passes since the last start: {passes["computed"]} computed, {passes["remembered"]} reused.'
  )


def failures(report: ComparisonReport) -> list[str]:
  """Name and reason of each failed cell."""
  return [f'{cell["name"]}: {cell["error"]}' for cell in report['cells'] if cell['state'] == 'failed']


def text(report: ComparisonReport) -> str:
  """Markdown: a row for each group, failures, and how the report was made."""
  failed = failures(report)
  parts = [f'{title}:\n\n{table.markdown()}\n' for title, table in tables(report).items()]
  lines = [*parts, *notes(report)]
  lines += ['', f'{len(failed)} failed:', '', *(f'- {failure}' for failure in failed)] if failed else []
  return '\n'.join([*lines, '', *made(report)]) + '\n'


def cells_table(report: ComparisonReport) -> Table:
  """A row for every cell; figures are unrounded, or None if absent."""
  kinds = {kind: f'perplexity_{kind}' for kind in ('dense', 'pruned', 'recovered')}
  kinds |= {kind: kind for kind in ('perplexity', 'excess', 'kl')}
  named = [(name, word, kind) for name, word in texts(report).items() for kind in kinds]
  columns = {f'{kind} {name}': kinds[kind] + word for name, word, kind in named}
  rows, more, last = [], _of_models(report), ('seconds', 'version', 'error')
  more += ['usable_dense'] * ('usable' in more)
  for cell in report['cells']:
    known, values = figures(cell), [plain(cell['values'][field]) for field in report['fields']]
    row = [cell['name'], cell['state'], *values, cell.get('params'), *map(known.get, [*more, *columns])]
    rows.append([*row, *map(cell.get, last)])
  head = ['cell', 'state', *report['fields'], 'params', *more, *columns.values(), *last]
  return Table(head, rows)
