"""Reports of mode compare: tables in Markdown, CSV, JSON and a page, and plots as SVG files.

A group consists of the cells that differ only in the field `over` (usually the seed): a row of the table, a
point of a plot. Figures that vary within it are given as median (lowest–highest).
"""

import csv
import html
import io
import json
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from adapt_jax.models.files import write_text
from adapt_jax.modes.compare_grid import short, show
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.page import cards, page
from adapt_jax.reports.report import CellReport, ComparisonReport, TextReport
from adapt_jax.reports.summary import excess as text_excess

Json = dict[str, Any]
Rows = list[list[str]]

MARKDOWN, CSV, JSON = 'compare.md', 'compare.csv', 'compare.json'
_MOST_COLUMNS = 12  # in the table of x
_WIDE = 8  # largest over smallest x, above which plots space the values evenly
_WORST = 20  # times the dense perplexity: upper limit of plots, so that a broken model flattens no others
_FEW = 6  # lines; more lines need a higher plot
_SAME_SIZE = 0.01  # of the dense parameters: models that differ by less are not plotted by their size


# -- figures -----------------------------------------------------------------------------------------


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


def _shown(spread: list[float] | None, form: str) -> str:
  """'12.34 (12.01–12.90)', or '12.34' if nothing varies."""
  if spread is None:
    return '–'
  middle, low, high = (format(value, form) for value in spread)
  return middle if low == high else f'{middle} ({low}–{high})'


# -- tables ------------------------------------------------------------------------------------------


def _fields(report: ComparisonReport) -> list[str]:
  return [field for field in report['fields'] if field != report['over']]


def _table(report: ComparisonReport) -> Rows:
  """A heading, then a row for each group."""
  names, dense = short(report['fields']), report['model']['params_before']
  fields, recover = _fields(report), report['recover']
  head = [*(names[f] for f in fields), 'parameters', 'of dense', 'perplexity pruned']
  named = texts(report)
  more = [f'{kind} {name}' for name in named for kind in ('excess', 'KL')] or ['excess']
  rows = [head + (['recovered'] if recover else []) + [*more, 'seconds', 'cells']]
  for group in report['groups']:
    share = group['params'] and [100 * value / dense for value in group['params']]
    row = [show(group['values'][field]) for field in fields]
    row += [_shown(group['params'], ',.0f'), f'{_shown(share, ".1f")} %' if share else '–']
    row.append(_shown(group['perplexity_pruned'], ',.2f'))
    if recover:
      row.append(_shown(group['perplexity_recovered'], ',.2f'))
    lost = [f'{kind} {name}' for name in named for kind in ('excess', 'kl')] or ['excess']
    row += [_shown(group[figure], '.3f') for figure in lost]
    row += [_shown(group['seconds'], ',.0f'), _state(group)]
    rows.append(row)
  return rows


def _state(group: Json) -> str:
  failed = f', {group["failed"]} failed' if group['failed'] else ''
  return f'{group["finished"]} of {group["cells"]}{failed}'


def _lines(report: ComparisonReport, without: str) -> dict[str, list[Json]]:
  """Groups with equal values in all fields but `without`, by the name of these values."""
  fields = [field for field in _fields(report) if field != without]
  names, found = short(report['fields']), dict[str, list[Json]]()
  for group in report['groups']:
    shown = [(f, names[f], show(group['values'][f])) for f in fields]
    alone = len(shown) == 1
    known = {f: alone or (v and isinstance(group['values'][f], str)) for f, _, v in shown}  # not numbers
    name = ', '.join(v if known[f] else f'{n} {v}' for f, n, v in shown)
    found.setdefault(name, []).append(group)
  return found


def _xs(report: ComparisonReport) -> list[Any]:
  """The values of x; numbers ascending, others in the grid's order."""
  found = list({show(g['values'][report['x']]): g['values'][report['x']] for g in report['groups']}.values())
  return sorted(found) if _numbers(found) else found


def _numbers(values: list[Any]) -> bool:
  return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _pivot(report: ComparisonReport) -> Rows:
  """Perplexity by line (row) and value of x (column), after a heading; [] if it would be trivial."""
  xs, lines = [show(x) for x in _xs(report)], _lines(report, report['x'])
  if len(_fields(report)) < 2 or not 1 < len(xs) <= _MOST_COLUMNS:
    return []
  names = short(report['fields'])
  others = [names[f] for f in _fields(report) if f != report['x']]
  rows = [[', '.join(others), *(f'{names[report["x"]]} {x}' for x in xs)]]
  for name, groups in lines.items():
    found = {show(group['values'][report['x']]): group for group in groups}
    rows.append([name, *(_shown(found[x]['perplexity'], ',.2f') if x in found else '' for x in xs)])
  return rows


def _notes(report: ComparisonReport) -> Iterator[str]:
  kind = 'recovered' if report['recover'] else 'pruned'
  dense = ', '.join(f'{value:.2f}' for value in _dense(report)) or 'not measured yet'
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
    f'Since the last start, {passes["computed"]} passes were computed and {passes["remembered"]} reused.'
  )


def _failures(report: ComparisonReport) -> list[str]:
  return [f'{cell["name"]}: {cell["error"]}' for cell in report['cells'] if cell['state'] == 'failed']


def _dense(report: ComparisonReport, text: str = '') -> list[float]:
  """The dense model's perplexities on a text ('': the first): one, unless the grid varies the texts."""
  done = [cell for cell in report['cells'] if cell['state'] == 'finished']
  if text:
    return list(dict.fromkeys(cell['texts'][text]['dense'] for cell in done if text in cell['texts']))
  return list(dict.fromkeys(cell['perplexity_dense'] for cell in done))


def _markdown(rows: Rows) -> list[str]:
  if not rows:
    return []
  lines = ['| ' + ' | '.join(cell.replace('|', r'\|') for cell in row) + ' |' for row in rows]
  return ['', lines[0], '|---' * len(rows[0]) + '|', *lines[1:]]


def table(report: ComparisonReport) -> str:
  """Markdown: perplexity by x, a row for each group, failures, and how the report was made."""
  failures = _failures(report)
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items() if count)
  return '\n'.join(
    [
      *_markdown(_pivot(report)),
      *_markdown(_table(report)),
      *('', *_notes(report)),
      *(('', f'{len(failures)} failed:', '', *(f'- {failure}' for failure in failures)) if failures else ()),
      *('', f'Compiles: {compiles or "none"}; {report["seconds"]:.0f} s in all.'),
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


# -- plots -------------------------------------------------------------------------------------------


def _top(report: ComparisonReport, text: str = '') -> float:
  """The highest perplexity that plots show."""
  return _WORST * max(_dense(report, text), default=math.inf)


def _series(
  report: ComparisonReport,
  lines: dict[str, list[Json]],
  figure: str,
  x_of: Callable[[Json], float | None],
  text: str = '',
) -> list[Series]:
  """A series for each line, at the x that `x_of` gives a group; groups without figures are left out.

  Points above _WORST times the dense model's perplexity are drawn at that height.
  """
  series, most = list[Series](), _top(report, text)
  for name, groups in lines.items():
    at = [(x, group) for group in groups if (x := group[figure] and x_of(group)) is not None]
    at.sort(key=lambda pair: pair[0])
    points, ranges = [], []
    for x, group in at:
      middle, low, high = group[figure]
      values = ', '.join(f'{field} {show(value)}' for field, value in group['values'].items())
      hover = f'{values}: {_shown(group[figure], ".5g")}, {group["params"][0]:,.0f} parameters'
      points.append((x, min(middle, most), hover))
      ranges += [(x, min(low, most), min(high, most))] if low < high else []
    again, colour = divmod(len(series), charts.COLOURS)
    series.append(Series(name, points, colour, ranges=ranges, dashed=again > 0))
  return series


def _chart(
  report: ComparisonReport, title: str, x_name: str, series: list[Series], text: str = '', **more: Any
) -> str:
  levels = [(value, f'dense {value:.2f}') for value in _dense(report, text)]
  most = _top(report, text)
  tops = [top for s in series for top in (*(y for _, y, _ in s.points), *(high for *_, high in s.ranges))]
  y_name = f'perplexity (up to {most:,.0f})' if max(tops, default=0) >= most else 'perplexity'
  height = 360 if len(series) > _FEW else 250
  return charts.line_chart(title, (x_name, y_name), series, levels=levels, log=True, height=height, **more)


def _over_x(report: ComparisonReport, figure: str, title: str, text: str = '') -> str:
  xs, x = _xs(report), report['x']
  even = not _numbers(xs) or (min(xs) > 0 and max(xs) / min(xs) > _WIDE)
  places = {show(value): i for i, value in enumerate(xs)}

  def x_of(group: Json) -> float:
    value = group['values'][x]
    return float(places[show(value)] if even else value)

  series = _series(report, _lines(report, x), figure, x_of, text)
  labels = [show(value) for value in xs] if even else []
  integer = not even and all(isinstance(value, int) for value in xs)
  return _chart(report, title, x, series, text, categories=labels, integer=integer)


def plots(report: ComparisonReport) -> dict[str, str]:
  """File name -> chart, without empty charts."""
  dense, kind = report['model']['params_before'], 'recovered' if report['recover'] else 'pruned'
  found = {'perplexity.svg': _over_x(report, 'perplexity', f'Perplexity {kind}')}
  for name in texts(report)[1:]:
    figure, title = f'perplexity {name}', f'Perplexity {kind}: {name}'
    found[f'perplexity-{name}.svg'] = _over_x(report, figure, title, name)
  if report['recover']:
    found['perplexity-pruned.svg'] = _over_x(report, 'perplexity_pruned', 'Perplexity after the last pruning')
  sizes = [value for group in report['groups'] for value in group['params'] or ()]
  if sizes and max(sizes) - min(sizes) > _SAME_SIZE * dense:
    series = _series(report, _lines(report, report['x']), 'perplexity', lambda group: group['params'][0])
    found['perplexity-parameters.svg'] = _chart(
      report, f'Perplexity {kind} by size', 'parameters reached', series
    )
  if (stages := 'prune.stages') in _fields(report):  # the paper's Fig. 4
    series = _series(
      report,
      _lines(report, stages),
      'perplexity',
      lambda group: (group['params'][0] / dense) ** (1 / group['values'][stages]),
    )
    found['perplexity-kept.svg'] = _chart(
      report, f'Perplexity {kind} by fraction kept per stage', 'fraction kept per stage', series
    )
  return {name: chart for name, chart in found.items() if chart}


# -- files -------------------------------------------------------------------------------------------


def _html(rows: Rows) -> str:
  if not rows:
    return ''
  e = html.escape
  lines = [''.join(f'<th>{e(cell)}</th>' for cell in rows[0])]
  lines += [''.join(f'<td>{e(cell)}</td>' for cell in row) for row in rows[1:]]
  return '<div class="card scroll"><table>' + '\n'.join(f'<tr>{x}</tr>' for x in lines) + '</table></div>'


def _body(report: ComparisonReport, figures: list[str]) -> str:
  e, cells = html.escape, report['cells']
  states = {state: [c for c in cells if c['state'] == state] for state in ('finished', 'failed', 'running')}
  counts = [f'{len(states["finished"])} of {len(cells)} cells finished', f'{report["seconds"]:,.0f} s']
  counts += [f'{len(states["failed"])} failed'] if states['failed'] else []
  counts += [f'now {cell["name"]}' for cell in states['running']]
  links = (f'<a href="cells/{e(c["name"])}/report.html">{e(c["name"])}</a>' for c in states['finished'])
  failures = ''.join(f'<p>{e(failure)}</p>' for failure in _failures(report))
  return '\n'.join(
    [
      f'<h1>{e(report["model"]["source"])}</h1>',
      f'<p class="state">compare: {e(", ".join(counts))}</p>',
      cards('grid', figures),
      _html(_pivot(report)),
      '<h2>Cells</h2>' + _html(_table(report)),
      *(f'<p>{e(note)}</p>' for note in _notes(report)),
      f'<h2>Failed</h2>{failures}' if failures else '',
      f'<p>Reports: {", ".join(links)}</p>' if states['finished'] else '',
      f'<h2>Command</h2><div class="card"><pre>{e(report["command"])}</pre></div>',
      f'<p>{e(", ".join(f"{k} {v}" for k, v in report["versions"].items()))}</p>',
    ]
  )


def write(workdir: Workdir, report: ComparisonReport, *, running: bool) -> None:
  """Writes all formats of the report but report.json, which only a finished grid has."""
  figures = plots(report)
  for name, chart in figures.items():
    write_text(workdir.path / name, charts.picture(chart))
  title = f'{report["model"]["source"]} compare'
  write_text(workdir.path / JSON, json.dumps(report, indent=2) + '\n')
  write_text(workdir.path / CSV, csv_text(report))
  write_text(workdir.path / MARKDOWN, table(report).lstrip('\n') + '\n')
  write_text(workdir.page, page(title, _body(report, list(figures.values())), running=running))
