"""Reports of mode sensitivity: a Markdown table, a CSV file, a page and pictures with one line per base."""

import csv
import html
import io
from collections.abc import Iterator

from adapt_jax.models.files import write_text
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.page import cards, page
from adapt_jax.reports.report import SensitivityReport, importance_name, layer_importance

MARKDOWN, CSV = 'sensitivity.md', 'sensitivity.csv'
_WHAT = {
  'both': 'a layer',
  'attention': "a layer's attention",
  'mlp': "a layer's MLP",
}


def write(workdir: Workdir, report: SensitivityReport, *, running: bool) -> None:
  """Writes report.html from the report so far; at the end also the table, the CSV file and the pictures."""
  write_text(workdir.page, page(f'{report["model"]["source"]} sensitivity', _body(report), running=running))
  if not running:
    write_text(workdir.path / MARKDOWN, table(report) + '\n')
    write_text(workdir.path / CSV, csv_text(report))
    for name, chart in figures(report).items():
      write_text(workdir.path / name, charts.picture(chart))


def _row(cells: list[str]) -> str:
  return f'| {" | ".join(cells)} |'


def _columns(report: SensitivityReport) -> Iterator[tuple[str, list[str]]]:
  """(name, one cell per layer): perplexities by base and block, then each base's layer importance."""
  layers, blocks = len(report['model']['ffn']), report['blocks']
  for base in report['bases']:
    for block in blocks:
      values = [f'{row[block]:.2f}' for row in base['layers']]
      name = f'base {base["sparsity"]:g}' + (f' {block}' if blocks != ['both'] else '')
      yield name, values + ['–'] * (layers - len(values))
  for base in report['bases']:
    distances = layer_importance(report['layer_distance'], base['layer_importance'])
    yield f'importance {base["sparsity"]:g}', [f'{x:.4f}' for x in distances]


def _widths(before: list[int], after: list[int]) -> str:
  """'3 → 2', or the distinct changes if layers differ."""
  return ', '.join(f'{a:,} → {b:,}' for a, b in dict.fromkeys(zip(before, after, strict=True)))


def _bases(report: SensitivityReport) -> list[list[str]]:
  """Rows of the table of bases, with the heading first."""
  rows = [['base sparsity', 'parameters', 'of dense', 'perplexity', "a layer's KV groups", 'MLP channels']]
  for base in report['bases']:
    share = 100 * base['params'] / report['model']['params_before']
    rows.append(
      [
        f'{base["sparsity"]:g}',
        f'{base["params"]:,}',
        f'{share:.1f} %',
        f'{base["perplexity"]:.2f}',
        _widths(base['kv_groups'], base['kv_groups_pruned']),
        _widths(base['ffn'], base['ffn_pruned']),
      ]
    )
  return rows


def _note(report: SensitivityReport) -> str:
  return (
    f'One decoder layer at a time loses {100 * report["sparsity"]:g} % of its width (whole KV groups, '
    f'rounded down; importance: {report["importance"]}). In a base, every layer is pruned to its sparsity, '
    f'rounded the same way. The importance of a layer is {importance_name(report["layer_distance"])}. '
    f'Perplexity is {report["perplexity"]["definition"]}.'
  )


def table(report: SensitivityReport) -> str:
  """Markdown: the bases, then a row per layer with its perplexity by base and its importance."""
  columns = list(_columns(report))
  layers = zip(*(cells for _, cells in columns), strict=True)
  bases, rows = _bases(report), [[str(i), *cells] for i, cells in enumerate(layers)]
  names = ['layer', *(name for name, _ in columns)]
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items())
  return '\n'.join(
    [
      *('', _row(bases[0]), '|---' * len(bases[0]) + '|', *map(_row, bases[1:])),
      *('', _row(names), '|---' * len(names) + '|', *map(_row, rows)),
      *('', _note(report), f'Compiled programs: {compiles or "none"}; {report["seconds"]:.0f} s.'),
      *(f'Command: `{report["command"]}`', ', '.join(f'{k} {v}' for k, v in report['versions'].items())),
    ]
  )


def csv_text(report: SensitivityReport) -> str:
  """A line for every base, layer and block, with the layer's widths before and after."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(
    ['base', 'layer', 'block', 'perplexity', 'base_perplexity', 'layer_importance']
    + ['kv_groups_before', 'kv_groups_after', 'ffn_before', 'ffn_after']
  )
  for base in report['bases']:
    for layer, found in enumerate(base['layers']):
      kv, ffn = base['kv_groups'][layer], base['ffn'][layer]
      for block, perplexity in found.items():
        kv_after = kv if block == 'mlp' else base['kv_groups_pruned'][layer]
        ffn_after = ffn if block == 'attention' else base['ffn_pruned'][layer]
        importance = base['layer_importance'][layer]
        writer.writerow(
          [base['sparsity'], layer, block, perplexity, base['perplexity'], importance]
          + [kv, kv_after, ffn, ffn_after]
        )
  return out.getvalue()


def _axis_end(report: SensitivityReport, block: str) -> float:
  """The highest perplexity that the chart's axis shows."""
  found = [layer[block] for base in report['bases'] for layer in base['layers']]
  found += [base['perplexity'] for base in report['bases']]
  return charts.axis_end(found)


def _perplexity_chart(report: SensitivityReport, block: str) -> str:
  series, end = [], _axis_end(report, block)
  for i, base in enumerate(report['bases']):
    name, colour, itself = f'base {base["sparsity"]:g}', i % charts.COLOURS, base['perplexity']
    points = [
      (layer, found[block], f'{name}, layer {layer}: {found[block]:.3f}')
      for layer, found in enumerate(base['layers'])
    ]
    series.append(Series(f'{name} ({itself:.2f})', points, colour))
    ends = [(layer, itself, '') for layer in (0, len(base['layers']) - 1)]
    series.append(Series('', ends if base['layers'] else [], colour, dashed=True))
  title = f'Perplexity with {100 * report["sparsity"]:g} % of {_WHAT[block]} pruned (dashed: the base)'
  return charts.line_chart(title, ('layer', 'perplexity'), series, log=True, integer=True, most=end)


def _clipped(report: SensitivityReport, block: str) -> str:
  """The points that the chart draws at the end of its axis, in words; '' if there are none."""
  end, found = _axis_end(report, block), list[str]()
  for base in report['bases']:
    for layer, row in enumerate(base['layers']):
      if row[block] > end:
        found.append(f'layer {layer} of base {base["sparsity"]:g}: {row[block]:,.2f}')
  return f'Above the axis for {_WHAT[block]}: {", ".join(found)}.' if found else ''


def _importance_chart(report: SensitivityReport) -> str:
  series = []
  for i, base in enumerate(report['bases']):
    name = f'base {base["sparsity"]:g}'
    values = enumerate(layer_importance(report['layer_distance'], base['layer_importance']))
    points = [(layer, x, f'{name}, layer {layer}: {x:.5g}') for layer, x in values]
    series.append(Series(name, points, i % charts.COLOURS))
  names = 'layer', importance_name(report['layer_distance'])
  log = all(point[1] > 0 for one in series for point in one.points)
  return charts.line_chart('Importance of the layers', names, series, log=log, integer=True)


def figures(report: SensitivityReport) -> dict[str, str]:
  """The charts as SVG, by name of file: perplexity for every block, and the importance of the layers."""
  found = {
    'perplexity.svg' if block == 'both' else f'perplexity-{block}.svg': _perplexity_chart(report, block)
    for block in report['blocks']
  }
  found['importance.svg'] = _importance_chart(report)
  return {name: chart for name, chart in found.items() if chart}


def _body(report: SensitivityReport) -> str:
  e = html.escape
  bases = _bases(report)
  lines = [''.join(f'<th>{e(cell)}</th>' for cell in bases[0])]
  lines += [''.join(f'<td>{e(cell)}</td>' for cell in row) for row in bases[1:]]
  done = sum(len(base['layers']) for base in report['bases'])
  return '\n'.join(
    [
      f'<h1>{e(report["model"]["source"])}</h1>',
      f'<p class="state">sensitivity of the layers: {done} measured, {report["seconds"]:,.0f} s</p>',
      '<div class="card scroll"><table>' + '\n'.join(f'<tr>{x}</tr>' for x in lines) + '</table></div>',
      cards('grid', list(figures(report).values())),
      *(f'<p>{e(text)}</p>' for block in report['blocks'] if (text := _clipped(report, block))),
      f'<p>{e(_note(report))}</p>',
      f'<h2>Command</h2><div class="card"><pre>{e(report["command"])}</pre></div>',
      f'<p>{e(", ".join(f"{k} {v}" for k, v in report["versions"].items()))}</p>',
    ]
  )
