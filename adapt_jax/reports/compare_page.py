"""The page and plots of mode compare, and of a run of several sizes.

A point of a plot is a group of cells; see `compare_tables`.
"""

import html
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from adapt_jax.models.files import write_text
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.compare_tables import (
  Json,
  cells_table,
  dense_perplexity,
  failures,
  groups,
  is_number,
  notes,
  short,
  show,
  tables,
  text,
  texts,
)
from adapt_jax.reports.page import due, figures, page, section
from adapt_jax.reports.page import notes as paragraphs
from adapt_jax.reports.report import ComparisonReport

MARKDOWN, CSV = 'compare.md', 'compare.csv'
_STAGES, _TARGET = 'prune.stages', 'prune.target'
_WIDE = 8  # largest over smallest x, above which plots space the values evenly
_WORST = 20  # times the dense perplexity: upper limit of plots, so that a broken model flattens no others
_SAME_SIZE = 0.01  # of the dense parameters: models that differ by less are not plotted by their size


def x_field(report: ComparisonReport) -> str:
  """The field on the x axis: prune.target, or else the first that varies with numbers, or else the first."""
  fields = [f for f in report['fields'] if f != report['over']] or report['fields']
  numbers = [f for f in fields if all(is_number(cell['values'][f]) for cell in report['cells'])]
  return _TARGET if _TARGET in fields else (numbers or fields)[0]


def _lines(report: ComparisonReport, x: str) -> dict[str, list[Json]]:
  """Groups with equal values in all fields but `x`, by the name of these values."""
  names, lines = short(report['fields']), dict[str, list[Json]]()
  for group in groups(report):
    others = {field: value for field, value in group['values'].items() if field != x}
    alone = [show(v) if isinstance(v, str) else f'{names[f]} {show(v)}' for f, v in others.items()]
    lines.setdefault(', '.join(alone), []).append(group)
  return lines


def _chart(
  report: ComparisonReport,
  title: str,
  figure: str,
  name: str,
  x_name: str,
  x_of: Callable[[Json], float],
  lines: dict[str, list[Json]],
  **more: Any,
) -> str:
  """A figure of each group on the text `name` over `x_of`; groups that lack it are left out."""
  dense, word = dense_perplexity(report, name), texts(report)[name]
  most = _WORST * max(dense, default=math.inf)
  series, above = list[Series](), False
  for line, members in lines.items():
    points, ranges = list[tuple[float, float]](), list[tuple[float, float, float]]()
    for group in members:
      if values := group['figures'].get(f'{figure} {name}'):
        above |= values[2] > most
        middle, low, high = (min(value, most) for value in values)
        points.append((x_of(group), middle))
        ranges += [(x_of(group), low, high)] if low < high else []
    dashed = len(series) >= charts.COLOURS
    series.append(Series(line, sorted(points), len(series), ranges=ranges, dashed=dashed))
  y_name = f'perplexity (up to {most:,.0f})' if above else 'perplexity'
  levels = [(value, f'dense {value:.2f}') for value in dense]
  title += f':{word}' if word else ''
  return charts.line_chart(title, (x_name, y_name), series, levels=levels, log=True, **more)


def _over_x(report: ComparisonReport, title: str, figure: str, name: str) -> str:
  x, cells = x_field(report), report['cells']
  values = list({show(cell['values'][x]): cell['values'][x] for cell in cells}.values())
  numbers = all(map(is_number, values))
  values = sorted(values) if numbers else values
  even = not numbers or (values[0] > 0 and values[-1] / values[0] > _WIDE)
  places = {show(value): i if even else value for i, value in enumerate(values)}
  categories = [show(value) for value in values] if even else []
  integer = not even and all(isinstance(value, int) for value in values)

  def x_of(group: Json) -> float:
    return float(places[show(group['values'].get(x, values[0]))])

  lines = _lines(report, x)
  return _chart(report, title, figure, name, x, x_of, lines, categories=categories, integer=integer)


def _loss_by_size(report: ComparisonReport) -> str:
  """The curve of a run of several sizes: a line for each text, from the dense model on."""
  dense, series = report['model']['params_before'], list[Series]()
  for name, word in texts(report).items():
    known = [group['figures'] for group in groups(report) if f'excess {name}' in group['figures']]
    points = [(100 * of['params'][0] / dense, of[f'excess {name}'][0]) for of in known]
    series.append(Series(word.strip(), sorted([*points, (100.0, 0.0)]) if points else [], len(series)))
  names = 'parameters kept, %', 'nats per token over dense'
  return charts.line_chart('Loss increase by size', names, series)


def plots(report: ComparisonReport) -> dict[str, str]:
  """File name -> chart, without empty charts."""
  dense, kind = report['model']['params_before'], 'recovered' if report['recover'] else 'pruned'
  names, drawn = list(texts(report)), dict[str, str]()
  if report['of'] == 'sizes':
    return {'loss.svg': _loss_by_size(report)} if names else {}
  for i, name in enumerate(names):
    chart = _over_x(report, f'Perplexity {kind}', 'perplexity', name)
    drawn[f'perplexity{f"-{name}" if i else ""}.svg'] = chart
  if names and report['recover']:
    title = 'Perplexity after the last pruning'
    drawn['perplexity-pruned.svg'] = _over_x(report, title, 'pruned', names[0])
  sizes = [cell['params'] for cell in report['cells'] if 'params' in cell]

  def size(group: Json) -> float:  # a group with perplexities has sizes
    return float(group['figures']['params'][0])

  def kept_per_stage(group: Json) -> float:
    return float((size(group) / dense) ** (1 / group['values'][_STAGES]))

  if names and sizes and max(sizes) - min(sizes) > _SAME_SIZE * dense:
    lines = _lines(report, x_field(report))
    by_size = f'Perplexity {kind} by size', 'perplexity', names[0], 'parameters reached', size
    drawn['perplexity-parameters.svg'] = _chart(report, *by_size, lines)
  if names and _STAGES in report['fields'] and report['over'] != _STAGES:  # the paper's Fig. 4
    by_stage = f'Perplexity {kind}', 'perplexity', names[0], 'fraction kept per stage', kept_per_stage
    drawn['perplexity-kept.svg'] = _chart(report, *by_stage, _lines(report, _STAGES))
  return {name: chart for name, chart in drawn.items() if chart}


def _body(report: ComparisonReport, drawn: list[str]) -> Iterator[str]:
  done = [html.escape(cell['name']) for cell in report['cells'] if cell['state'] == 'finished']
  shown = [section(title, table.html()) for title, table in tables(report).items()]
  yield from shown[:2]  # what was gained and lost
  yield figures(drawn)
  yield from shown[2:]
  yield paragraphs(notes(report))
  yield section('Failed', paragraphs(failures(report)))
  links = ', '.join(f'<a href="{report["of"]}/{name}/report.html">{name}</a>' for name in done)
  yield f'<p>Reports: {links}</p>' if done else ''


def _state(report: ComparisonReport) -> str:
  cells = report['cells']
  count = {state: sum(cell['state'] == state for cell in cells) for state in ('finished', 'failed')}
  parts = [f'{count["finished"]} of {len(cells)} {report["of"]} finished', f'{report["seconds"]:,.0f} s']
  parts += [f'{count["failed"]} failed'] if count['failed'] else []
  return ', '.join([*parts, *(f'now {cell["name"]}' for cell in cells if cell['state'] == 'running')])


def write(directory: pathlib.Path, report: ComparisonReport, *, running: bool) -> None:
  """Writes the tables and, if it is `due`, the page with its plots."""
  write_text(directory / CSV, cells_table(report).csv())
  write_text(directory / MARKDOWN, text(report))
  if not due(path := directory / 'report.html', running):
    return
  drawn = plots(report)
  for name, chart in drawn.items():
    write_text(directory / name, chart)
  body, title = _body(report, list(drawn.values())), f'{report["model"]["source"]}, {report["of"]}'
  write_text(path, page(title, _state(report), body, report, running=running))
