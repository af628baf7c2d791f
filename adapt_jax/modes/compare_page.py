"""The page and plots of mode compare, and the files that it writes.

A point of a plot is a group of cells; see `compare_tables`.
"""

import html
import json
import math
from collections.abc import Callable
from typing import Any

from adapt_jax.models.files import write_text
from adapt_jax.modes.compare_grid import show
from adapt_jax.modes.compare_tables import (
  Json,
  Rows,
  are_numbers,
  csv_text,
  dense_perplexity,
  failures_of,
  fields_of,
  first_text,
  lines_of,
  notes,
  pivot,
  readable,
  rows_of,
  shown_range,
  table,
  texts,
  x_values,
)
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.page import cards, page
from adapt_jax.reports.report import ComparisonReport

MARKDOWN, CSV, JSON = 'compare.md', 'compare.csv', 'compare.json'
_WIDE = 8  # largest over smallest x, above which plots space the values evenly
_WORST = 20  # times the dense perplexity: upper limit of plots, so that a broken model flattens no others
_FEW = 6  # lines; more lines need a higher plot
_SAME_SIZE = 0.01  # of the dense parameters: models that differ by less are not plotted by their size


def _top(report: ComparisonReport, text: str = '') -> float:
  """The highest perplexity that plots show."""
  return _WORST * max(dense_perplexity(report, text), default=math.inf)


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
      values = ', '.join(f'{field} {readable(value)}' for field, value in group['values'].items())
      hover = f'{values}: {shown_range(group[figure], ".5g")}, {group["params"][0]:,.0f} parameters'
      points.append((x, min(middle, most), hover))
      ranges += [(x, min(low, most), min(high, most))] if low < high else []
    again, colour = divmod(len(series), charts.COLOURS)
    series.append(Series(name, points, colour, ranges=ranges, dashed=again > 0))
  return series


def _chart(
  report: ComparisonReport, title: str, x_name: str, series: list[Series], text: str = '', **more: Any
) -> str:
  levels = [(value, f'dense {value:.2f}') for value in dense_perplexity(report, text)]
  most = _top(report, text)
  tops = [top for s in series for top in (*(y for _, y, _ in s.points), *(high for *_, high in s.ranges))]
  y_name = f'perplexity (up to {most:,.0f})' if max(tops, default=0) >= most else 'perplexity'
  height = 360 if len(series) > _FEW else 250
  return charts.line_chart(title, (x_name, y_name), series, levels=levels, log=True, height=height, **more)


def _over_x(report: ComparisonReport, figure: str, title: str, text: str = '') -> str:
  xs, x = x_values(report), report['x']
  even = not are_numbers(xs) or (min(xs) > 0 and max(xs) / min(xs) > _WIDE)
  places = {show(value): i for i, value in enumerate(xs)}

  def x_of(group: Json) -> float:
    value = group['values'][x]
    return float(places[show(value)] if even else value)

  series = _series(report, lines_of(report, x), figure, x_of, text)
  labels = [readable(value) for value in xs] if even else []
  integer = not even and all(isinstance(value, int) for value in xs)
  return _chart(report, title, x, series, text, categories=labels, integer=integer)


def plots(report: ComparisonReport) -> dict[str, str]:
  """File name -> chart, without empty charts."""
  dense, kind = report['model']['params_before'], 'recovered' if report['recover'] else 'pruned'
  first = first_text(report, ': ')
  found = {'perplexity.svg': _over_x(report, 'perplexity', f'Perplexity {kind}{first}')}
  for name in texts(report)[1:]:
    figure, title = f'perplexity {name}', f'Perplexity {kind}: {name}'
    found[f'perplexity-{name}.svg'] = _over_x(report, figure, title, name)
  if report['recover']:
    found['perplexity-pruned.svg'] = _over_x(
      report, 'perplexity_pruned', f'Perplexity after the last pruning{first}'
    )
  sizes = [value for group in report['groups'] for value in group['params'] or ()]
  if sizes and max(sizes) - min(sizes) > _SAME_SIZE * dense:
    series = _series(report, lines_of(report, report['x']), 'perplexity', lambda group: group['params'][0])
    found['perplexity-parameters.svg'] = _chart(
      report, f'Perplexity {kind} by size{first}', 'parameters reached', series
    )
  if (stages := 'prune.stages') in fields_of(report):  # the paper's Fig. 4
    series = _series(
      report,
      lines_of(report, stages),
      'perplexity',
      lambda group: (group['params'][0] / dense) ** (1 / group['values'][stages]),
    )
    found['perplexity-kept.svg'] = _chart(
      report, f'Perplexity {kind} by fraction kept per stage{first}', 'fraction kept per stage', series
    )
  return {name: chart for name, chart in found.items() if chart}


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
  failures = ''.join(f'<p>{e(failure)}</p>' for failure in failures_of(report))
  return '\n'.join(
    [
      f'<h1>{e(report["model"]["source"])}</h1>',
      f'<p class="state">compare: {e(", ".join(counts))}</p>',
      cards('grid', figures),
      _html(pivot(report)),
      '<h2>Cells</h2>' + _html(rows_of(report)),
      *(f'<p>{e(note)}</p>' for note in notes(report)),
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
