"""Reports of mode sensitivity: a Markdown table, a CSV file, a page and pictures with one line per base."""

import pathlib
from collections.abc import Iterator

from adapt_jax.models.files import write_text
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.page import due, figures, notes, page, section
from adapt_jax.reports.report import SensitivityReport, importance_name, layer_importance, made
from adapt_jax.reports.table import Table

MARKDOWN, CSV = 'sensitivity.md', 'sensitivity.csv'


def write(directory: pathlib.Path, report: SensitivityReport, *, running: bool) -> None:
  """Writes the page, if it is `due`; at the end also the tables and the pictures."""
  if due(path := directory / 'report.html', running):
    done = sum(len(base['layers']) for base in report['bases'])
    state = f'sensitivity of the layers: {done} measured, {report["seconds"]:,.0f} s'
    title = f'{report["model"]["source"]} sensitivity'
    write_text(path, page(title, state, _body(report), report, running=running))
  if not running:
    write_text(directory / MARKDOWN, text(report))
    write_text(directory / CSV, layers_table(report).csv())
    for name, chart in pictures(report).items():
      write_text(directory / name, chart)


def _widths(before: list[int], after: list[int]) -> str:
  """'3 → 2', or the distinct changes if layers differ."""
  return ', '.join(f'{a:,} → {b:,}' for a, b in dict.fromkeys(zip(before, after, strict=True)))


def _bases_table(report: SensitivityReport) -> Table:
  rows = []
  for base in report['bases']:
    share = 100 * base['params'] / report['model']['params_before']
    row = [f'{base["sparsity"]:g}', f'{base["params"]:,}', f'{share:.1f} %', f'{base["perplexity"]:.2f}']
    row.append(_widths(base['kv_groups'], base['kv_groups_pruned']))
    rows.append([*row, _widths(base['ffn'], base['ffn_pruned'])])
  head = ['base sparsity', 'parameters', 'of dense', 'perplexity', "a layer's KV groups", 'MLP channels']
  return Table(head, rows)


def _by_layer(report: SensitivityReport) -> Table:
  """A row per layer: its perplexity and its importance in each base."""
  bases, rows = report['bases'], []
  importance = [layer_importance(report['layer_distance'], base['layer_importance']) for base in bases]
  for layer in range(len(report['model']['ffn'])):
    values = [f'{b["layers"][layer]:.2f}' if layer < len(b['layers']) else '–' for b in bases]
    rows.append([layer, *values, *(f'{of[layer]:.4f}' for of in importance)])
  names = [f'{what} {base["sparsity"]:g}' for what in ('base', 'importance') for base in bases]
  return Table(['layer', *names], rows)


def _note(report: SensitivityReport) -> str:
  return (
    f'One decoder layer at a time loses {100 * report["sparsity"]:g} % of its width (whole KV groups, '
    f'rounded down; importance: {report["importance"]}). In a base, every layer is pruned to its sparsity, '
    f'rounded the same way. The importance of a layer is {importance_name(report["layer_distance"])}. '
    f'Perplexity is {report["perplexity"]["definition"]}.'
  )


def text(report: SensitivityReport) -> str:
  """Markdown: the bases, then a row per layer with its perplexity by base and its importance."""
  tables = _bases_table(report).markdown(), '', _by_layer(report).markdown()
  return '\n'.join([*tables, '', _note(report), *made(report)]) + '\n'


def layers_table(report: SensitivityReport) -> Table:
  """A row for every base and layer, with the layer's widths before and after."""
  rows = []
  for base in report['bases']:
    widths = [base[name] for name in ('kv_groups', 'kv_groups_pruned', 'ffn', 'ffn_pruned')]
    for layer, perplexity in enumerate(base['layers']):
      figures_of = [perplexity, base['perplexity'], base['layer_importance'][layer]]
      rows.append([base['sparsity'], layer, *figures_of, *(of[layer] for of in widths)])
  head = ['base', 'layer', 'perplexity', 'base_perplexity', 'layer_importance']
  return Table([*head, 'kv_groups_before', 'kv_groups_after', 'ffn_before', 'ffn_after'], rows)


def _perplexity_chart(report: SensitivityReport) -> str:
  series, bases = [], report['bases']
  end = charts.axis_end([*(x for base in bases for x in base['layers']), *(b['perplexity'] for b in bases)])
  for i, base in enumerate(bases):
    name, itself, layers = f'base {base["sparsity"]:g}', base['perplexity'], base['layers']
    series.append(Series(f'{name} ({itself:.2f})', list(enumerate(layers)), i))
    ends = [(layer, itself) for layer in (0, len(layers) - 1)] if layers else []
    series.append(Series('', ends, i, 'curve', dashed=True))
  above = f' (up to {end:,.0f})' if any(x > end for base in bases for x in base['layers']) else ''
  title = f'Perplexity with {100 * report["sparsity"]:g} % of a layer pruned (dashed: the base)'
  return charts.line_chart(title, ('layer', f'perplexity{above}'), series, log=True, integer=True, most=end)


def _importance_chart(report: SensitivityReport) -> str:
  series = []
  for i, base in enumerate(report['bases']):
    values = layer_importance(report['layer_distance'], base['layer_importance'])
    series.append(Series(f'base {base["sparsity"]:g}', list(enumerate(values)), i))
  names = 'layer', importance_name(report['layer_distance'])
  log = all(y > 0 for one in series for _, y in one.points)
  return charts.line_chart('Importance of the layers', names, series, log=log, integer=True)


def pictures(report: SensitivityReport) -> dict[str, str]:
  """The charts by name of file."""
  drawn = {'perplexity.svg': _perplexity_chart(report), 'importance.svg': _importance_chart(report)}
  return {name: chart for name, chart in drawn.items() if chart}


def _body(report: SensitivityReport) -> Iterator[str]:
  yield section('Bases', _bases_table(report).html())
  yield figures(pictures(report).values())
  yield notes([_note(report)])
