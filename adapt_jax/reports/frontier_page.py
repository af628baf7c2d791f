"""The page of mode frontier: loss over size and over speed, all files and the frontier."""

import pathlib
from collections.abc import Callable, Iterator

from adapt_jax.models.files import write_text
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.frontier import SIZE, SPEED, FrontierReport, FrontierRow, notes, table, text, values
from adapt_jax.reports.page import due, figures, page, section
from adapt_jax.reports.page import notes as paragraphs

CSV, MARKDOWN = 'frontier.csv', 'frontier.md'


def write(directory: pathlib.Path, report: FrontierReport, *, running: bool) -> None:
  """Writes the page, if it is `due`, and at the end the tables and the charts."""
  drawn = {'size.svg': by_size(report), 'speed.svg': by_speed(report)}
  if due(path := directory / 'report.html', running):
    state = f'frontier: {len(report["rows"])} files measured, {report["seconds"]:,.0f} s'
    title = f'{report["model"]["source"]} frontier'
    write_text(path, page(title, state, _body(report, list(drawn.values())), report, running=running))
  if not running:
    write_text(directory / CSV, values(report).csv())
    write_text(directory / MARKDOWN, text(report) + '\n')
    for name, chart in drawn.items():
      write_text(directory / name, chart)


def _body(report: FrontierReport, drawn: list[str]) -> Iterator[str]:
  yield paragraphs(report['advice'])
  yield figures(drawn)
  if report['rows']:
    yield section('Files', table(report).html(), paragraphs(notes(report)))


def by_size(report: FrontierReport) -> str:
  """Loss increase over MB; '' if nothing is measured."""
  return _chart(report, 'Loss by size', 'MB of the file', SIZE, lambda row: row['bytes'] / 1e6)


def by_speed(report: FrontierReport) -> str:
  """Loss increase over tokens per second of decoding; '' if that is not measured of all files."""
  if not all('decode' in row for row in report['rows']):
    return ''
  name = f'decode, tokens/s on {report["threads"]} threads'
  return _chart(report, 'Loss by speed', name, SPEED, lambda row: row['decode']['median'])


def _chart(
  report: FrontierReport, title: str, name: str, limit: str, x: Callable[[FrontierRow], float]
) -> str:
  def line(legend: str, rows: list[FrontierRow], colour: int, **more: bool | str) -> Series:
    ordered = sorted(rows, key=x)
    points = [(x(row), row['loss_increase']) for row in ordered]
    labels = [] if more.get('dashed') else [row['type'] for row in ordered]
    return Series(legend, points, colour, labels=labels, **more)  # type: ignore[arg-type]

  rows = report['rows']
  models = dict.fromkeys(row['model'] for row in rows)
  series = [
    line(model, [row for row in rows if row['model'] == model], i, kind='dots')
    for i, model in enumerate(models)
  ]
  best = [row for row in rows if limit in row['best_for']]
  series.append(line('frontier', best, charts.COLOURS - 1, kind='curve', dashed=True))
  most = charts.axis_end(max(0.0, row['loss_increase']) for row in rows)
  above = any(row['loss_increase'] > most for row in rows)
  y_name = f'loss increase, nats per token{f" (up to {most:.3g})" if above else ""}'
  return charts.line_chart(title, (name, y_name), series, most=most)
