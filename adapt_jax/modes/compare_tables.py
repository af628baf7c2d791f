"""Figures and tables of mode compare, in Markdown and CSV.

A group consists of the cells that differ only in the field `over` (usually the seed): a row of the table, a
point of a plot. Figures that vary within it are given as median (lowest–highest).
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from adapt_jax.modes.compare_grid import short, show
from adapt_jax.reports.report import CellReport, ComparisonReport, TextReport
from adapt_jax.reports.summary import excess as text_excess

Json = dict[str, Any]
Rows = list[list[str]]

_MOST_COLUMNS = 12  # in the table of x


def final(cell: CellReport) -> float:
  """The perplexity of a finished cell's model: recovered if it was trained, else pruned."""
  recovered = cell['perplexity_recovered']
  return cell['perplexity_pruned'] if recovered is None else recovered


def excess(cell: CellReport) -> float:
  """ln(perplexity / dense perplexity), nats per token."""
  return math.log(final(cell) / cell['perplexity_dense'])


_FIGURES: dict[str, Callable[[CellReport], float | None]] = {
  'params': lambda cell: cell['params'],
  'perplexity_pruned': lambda cell: cell['perplexity_pruned'],
  'perplexity_recovered': lambda cell: cell['perplexity_recovered'],
  'perplexity': final,
  'excess': excess,
  'seconds': lambda cell: cell['seconds'],
}


def texts(report: ComparisonReport) -> list[str]:
  """Names of the texts if cells measure several; [] otherwise."""
  found = dict.fromkeys(name for cell in report['cells'] for name in cell.get('texts', {}))
  return list(found) if len(found) > 1 else []


def first_text(report: ComparisonReport, before: str) -> str:
  """The name of the text that figures without a name belong to, after `before`; '' if there is one text."""
  named = texts(report)
  return f'{before}{named[0]}' if named else ''


def _on_text(name: str) -> dict[str, Callable[[CellReport], float | None]]:
  """Figures of a cell on one text."""

  def of(cell: CellReport) -> TextReport:
    return cell.get('texts', {}).get(name, {})

  return {
    f'perplexity {name}': lambda cell: of(cell).get('recovered', of(cell).get('pruned')),
    f'excess {name}': lambda cell: text_excess(of(cell)),
    f'kl {name}': lambda cell: of(cell).get('kl'),
  }


def with_groups(report: ComparisonReport) -> ComparisonReport:
  """The report with 'groups': for each group its values, the numbers of cells, finished and failed, and for
  every figure [median, lowest, highest] over the finished cells, or None."""
  found: dict[str, list[CellReport]] = {}
  for cell in report['cells']:
    values = {k: v for k, v in cell['values'].items() if k != report['over']}
    found.setdefault(json.dumps(values), []).append(cell)
  groups: list[Json] = []
  figures = dict(_FIGURES)
  for name in texts(report):
    figures |= _on_text(name)
  for members in found.values():
    done = [cell for cell in members if cell['state'] == 'finished']
    group: Json = {
      'values': {k: v for k, v in members[0]['values'].items() if k != report['over']},
      'cells': len(members),
      'finished': len(done),
      'failed': sum(cell['state'] == 'failed' for cell in members),
    }
    groups.append(group | {name: _spread([of(cell) for cell in done]) for name, of in figures.items()})
  return {**report, 'groups': _sorted(groups)}


def _sorted(groups: list[Json]) -> list[Json]:
  """Sorts by the fields from left to right, with values in the order of their first cell."""
  rows = [[show(value) for value in group['values'].values()] for group in groups]
  seen = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
  places = [[order.index(x) for order, x in zip(seen, row, strict=True)] for row in rows]
  return [groups[i] for i in sorted(range(len(groups)), key=places.__getitem__)]


def _spread(values: list[float | None]) -> list[float] | None:
  known = [value for value in values if value is not None]
  return [statistics.median(known), min(known), max(known)] if known else None


def shown_range(spread: list[float] | None, form: str) -> str:
  """'12.34 (12.01–12.90)', or '12.34' if nothing varies."""
  if spread is None:
    return '–'
  middle, low, high = (format(value, form) for value in spread)
  return middle if low == high else f'{middle} ({low}–{high})'


def readable(value: Any) -> str:
  """A value as a reader sees it: whole numbers from 10,000 on have commas, also where they are floats."""
  whole = are_numbers([value]) and value >= 10_000 and value == int(value)
  return f'{value:,.0f}' if whole else show(value)


def fields_of(report: ComparisonReport) -> list[str]:
  return [field for field in report['fields'] if field != report['over']]


def rows_of(report: ComparisonReport) -> Rows:
  """A heading, then a row for each group."""
  names, dense = short(report['fields']), report['model']['params_before']
  fields, recover = fields_of(report), report['recover']
  named, first = texts(report), first_text(report, ' ')
  head = [*(names[f] for f in fields), 'parameters', 'of dense', f'perplexity pruned{first}']
  more = [f'{kind} {name}' for name in named for kind in ('excess', 'KL')] or ['excess']
  rows = [head + ([f'recovered{first}'] if recover else []) + [*more, 'seconds', 'cells']]
  for group in report['groups']:
    share = group['params'] and [100 * value / dense for value in group['params']]
    row = [readable(group['values'][field]) for field in fields]
    row += [shown_range(group['params'], ',.0f'), f'{shown_range(share, ".1f")} %' if share else '–']
    row.append(shown_range(group['perplexity_pruned'], ',.2f'))
    if recover:
      row.append(shown_range(group['perplexity_recovered'], ',.2f'))
    lost = [f'{kind} {name}' for name in named for kind in ('excess', 'kl')] or ['excess']
    row += [shown_range(group[figure], '.3f') for figure in lost]
    row += [shown_range(group['seconds'], ',.0f'), _state(group)]
    rows.append(row)
  return rows


def _state(group: Json) -> str:
  failed = f', {group["failed"]} failed' if group['failed'] else ''
  return f'{group["finished"]} of {group["cells"]}{failed}'


def lines_of(report: ComparisonReport, without: str) -> dict[str, list[Json]]:
  """Groups with equal values in all fields but `without`, by the name of these values."""
  fields = [field for field in fields_of(report) if field != without]
  names, found = short(report['fields']), dict[str, list[Json]]()
  for group in report['groups']:
    shown = [(f, names[f], readable(group['values'][f])) for f in fields]
    alone = len(shown) == 1
    known = {f: (alone or v) and isinstance(group['values'][f], str) for f, _, v in shown}  # not numbers
    name = ', '.join(v if known[f] else f'{n} {v}' for f, n, v in shown)
    found.setdefault(name, []).append(group)
  return found


def x_values(report: ComparisonReport) -> list[Any]:
  """The values of x; numbers ascending, others in the grid's order."""
  found = list({show(g['values'][report['x']]): g['values'][report['x']] for g in report['groups']}.values())
  return sorted(found) if are_numbers(found) else found


def are_numbers(values: list[Any]) -> bool:
  return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def pivot(report: ComparisonReport) -> Rows:
  """Perplexity by line (row) and value of x (column), after a heading; [] if it would be trivial."""
  xs, lines = [show(x) for x in x_values(report)], lines_of(report, report['x'])
  if len(fields_of(report)) < 2 or not 1 < len(xs) <= _MOST_COLUMNS:
    return []
  names = short(report['fields'])
  others = [names[f] for f in fields_of(report) if f != report['x']]
  head = f'perplexity{first_text(report, " ")} by {", ".join(others)}'
  rows = [[head, *(f'{names[report["x"]]} {readable(x)}' for x in x_values(report))]]
  for name, groups in lines.items():
    found = {show(group['values'][report['x']]): group for group in groups}
    rows.append([name, *(shown_range(found[x]['perplexity'], ',.2f') if x in found else '' for x in xs)])
  return rows


def notes(report: ComparisonReport) -> Iterator[str]:
  kind = 'recovered' if report['recover'] else 'pruned'
  measured = [(name, value) for name in texts(report) or [''] for value in dense_perplexity(report, name)]
  dense = ', '.join(f'{name} {value:.2f}'.lstrip() for name, value in measured) or 'not measured yet'
  yield f'The dense model has {report["model"]["params_before"]:,} parameters and perplexity {dense}.'
  definitions = '; or '.join(report['perplexity']['definitions'])
  yield f'Excess is ln(perplexity {kind} / dense), nats per token.' + (
    f' Perplexity is {definitions}.' if definitions else ''
  )
  if any(group['cells'] > 1 for group in report['groups']):
    yield f'Where {report["over"]} varies: median (lowest–highest) over its values.'
  passes = report['scoring_passes']
  yield (
    'Cells share scoring passes and programs; the time of each counts for the cell that computes it. '
    f'Scoring passes since the last start: {passes["computed"]} computed, {passes["remembered"]} reused.'
  )


def failures_of(report: ComparisonReport) -> list[str]:
  return [f'{cell["name"]}: {cell["error"]}' for cell in report['cells'] if cell['state'] == 'failed']


def dense_perplexity(report: ComparisonReport, text: str = '') -> list[float]:
  """The dense model's perplexities on a text ('': the first): one, unless the grid varies the texts."""
  done = [cell for cell in report['cells'] if cell['state'] == 'finished']
  if text:
    found = [cell['texts'][text] for cell in done if text in cell['texts']]
    return list(dict.fromkeys(of['dense'] for of in found))
  return list(dict.fromkeys(cell['perplexity_dense'] for cell in done))


def _markdown(rows: Rows) -> list[str]:
  if not rows:
    return []
  lines = ['| ' + ' | '.join(cell.replace('|', r'\|') for cell in row) + ' |' for row in rows]
  return ['', lines[0], '|---' * len(rows[0]) + '|', *lines[1:]]


def table(report: ComparisonReport) -> str:
  """Markdown: perplexity by x, a row for each group, failures, and how the report was made."""
  failures = failures_of(report)
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items() if count)
  return '\n'.join(
    [
      *_markdown(pivot(report)),
      *_markdown(rows_of(report)),
      *('', *notes(report)),
      *(('', f'{len(failures)} failed:', '', *(f'- {failure}' for failure in failures)) if failures else ()),
      *('', f'Compiled programs: {compiles or "none"}; {report["seconds"]:.0f} s.'),
      *(f'Command: `{report["command"]}`', ', '.join(f'{k} {v}' for k, v in report['versions'].items())),
    ]
  )


def csv_text(report: ComparisonReport) -> str:
  """CSV with a line for every cell; figures are unrounded, or empty if absent."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  figures = ['params', 'perplexity_dense', 'perplexity_pruned', 'perplexity_recovered']
  on_texts = {k: of for name in texts(report) for k, of in _on_text(name).items()}
  writer.writerow(['cell', 'state', *report['fields'], *figures, 'excess', *on_texts, 'seconds', 'error'])
  for cell in report['cells']:
    values = [show(cell['values'][field]) for field in report['fields']]
    ratio = excess(cell) if cell['state'] == 'finished' else ''
    known: dict[str, Any] = dict(cell)
    found = ['' if known.get(name) is None else known[name] for name in figures]
    more = ['' if (value := of(cell)) is None else value for of in on_texts.values()]
    row = [cell['name'], cell['state'], *values, *found, ratio, *more]
    writer.writerow([*row, cell.get('seconds', ''), cell.get('error', '')])
  return out.getvalue()
