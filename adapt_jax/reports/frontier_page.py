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
  best = sorted((row for row in report['rows'] if SIZE in row['best_for']), key=_megabytes)
  return _chart(report, 'Loss by size', 'MB of the file', best, _megabytes)


def by_speed(report: FrontierReport) -> str:
  """Loss increase over tokens per second of decoding; '' if that is not measured of all files."""
  if not all('decode' in row for row in report['rows']):
    return ''
  best = sorted((row for row in report['rows'] if SPEED in row['best_for']), key=_rate, reverse=True)
  return _chart(report, 'Loss by speed', 'tokens/s of decoding', best, _rate)


def _megabytes(row: FrontierRow) -> float:
  return row['bytes'] / 1e6


def _rate(row: FrontierRow) -> float:
  return row['decode']['median']


def _chart(
  report: FrontierReport,
  title: str,
  name: str,
  best: list[FrontierRow],
  x: Callable[[FrontierRow], float],
) -> str:
  """All rows, and the frontier as steps: `best` has the cheapest file first, which is best until the next."""

  def points(rows: list[FrontierRow]) -> list[tuple[float, float]]:
    return [(x(row), row['loss_increase']) for row in rows]

  series = [Series('frontier', points(best), charts.COLOURS - 1, 'step', dashed=True)]
  for i, model in enumerate(dict.fromkeys(row['model'] for row in report['rows'])):
    rows = [row for row in report['rows'] if row['model'] == model]
    series.append(Series(model, points(rows), i, 'dots', labels=[row['type'] for row in rows]))
  most = charts.axis_end(max(0.0, row['loss_increase']) for row in report['rows'])
  above = any(row['loss_increase'] > most for row in report['rows'])
  y_name = f'loss increase, nats per token{f" (up to {most:.3g})" if above else ""}'
  return charts.line_chart(title, (name, y_name), series, most=most)
