"""`report.html`: one page about a run, rewritten during the run; it needs only a browser.

It shows the contents of `report.json` and `metrics.jsonl`; what they do not have yet is absent.
"""

import html
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

from adapt_jax.config.build import flatten
from adapt_jax.config.units import amount
from adapt_jax.config.values import TEXT
from adapt_jax.models.files import write_text
from adapt_jax.reports.page import cards, html_table, page
from adapt_jax.reports.report import ExampleReport, RunReport, known_perplexities
from adapt_jax.reports.run_charts import (
  MOST_STAGES,
  RunData,
  budget_chart,
  excess_chart,
  heat_maps,
  perplexity_chart,
  perplexity_over_tokens,
  stage_widths,
  text_names,
  training_chart,
)
from adapt_jax.reports.summary import (
  cost_cells,
  cost_columns,
  tasks_rows,
  texts_rows,
  warnings,
)

Json = dict[str, Any]


def _decimal(value: float | None) -> str:
  return '–' if value is None else f'{value:,.2f}'


def _whole(value: float | None) -> str:
  return '–' if value is None else f'{value:,.0f}'


def _state(data: RunData, running: bool) -> str:
  seen = [s['stage'] for s in (*data.stages, *data.events) if 'stage' in s]
  count = max([1, len(data.schedule.get('targets', [])), *seen])
  if not running:
    return f'finished, {count} stage{"s" if count > 1 else ""}'
  last = data.events[-1] if data.events else {'event': ''}
  total = f' of {data.schedule["train_steps"]}' if 'train_steps' in data.schedule else ''
  doing = {
    'prune': f'pruning, step {last.get("step")} done',
    'train': f'recovering, training step {last.get("step")}{total} done',
    'evaluate': f'evaluated the {last.get("of")} model',
    'tasks': f'evaluated tasks, {last.get("of")}',
  }
  return f'running, stage {max([1, *seen])} of {count}: {doing.get(last["event"], "starting")}'


def _title(data: RunData) -> str:
  """The model, and what was done to it."""
  before, rows = data.model['params_before'], (*data.stages, *data.of('prune'))
  if not rows:
    return data.model['source']
  done = ' and recovered' if data.of('train') else ''
  return f'{data.model["source"]}, pruned to {min(row["params"] for row in rows) / before:.1%}{done}'


def _export_rows(exports: dict[str, Json]) -> list[list[str]]:
  rows = [['export', 'type', 'MB', 'largest logit difference when read back', 'same token']]
  for name, found in exports.items():
    same = f'{found["same_token"]:.1%}' if 'same_token' in found else ''
    difference = f'{found["logit_difference"]:.2g}' if 'logit_difference' in found else ''
    rows.append([name, str(found.get('type', '')), f'{found["bytes"] / 1e6:,.1f}', difference, same])
  return rows


def _settings_rows(report: RunReport) -> list[list[str]]:
  """Every setting that the result depends on; empty before the report has any."""
  rows = []
  for group, values in (('prune', report.get('prune')), ('train', report.get('train'))):
    for name, value in flatten(values or {}).items():
      rows.append([f'{group}.{name}', ', '.join(map(str, value)) if isinstance(value, list) else str(value)])
  return [['setting', 'value'], *rows] if rows else []


def _facts(data: RunData) -> Iterator[tuple[str, str]]:
  """(figure, description) pairs of the header."""
  model, report = data.model, data.report
  if known := known_perplexities(report):
    yield ' → '.join(map(_decimal, known.values())), f'perplexity {" → ".join(known)}'
  before = model['params_before']
  after = min([before, *(row['params'] for row in (*data.stages, *data.of('prune')))])
  target = f', target {model["params_target"]:,}' if 'params_target' in model else ''
  yield f'{before:,} → {after:,}', f'parameters, {100 * after / before:.1f} % left{target}'
  budget = report.get('budget')
  if budget and budget['kind'] != 'params':
    figures = [amount(budget['kind'], budget[name]) for name in ('dense', 'reached', 'asked')]
    of_dense = f'{100 * budget["reached"] / budget["dense"]:.1f} % left'
    yield f'{figures[0]} → {figures[1]}', f'{budget["unit"]}, {of_dense}, target {figures[2]}'
    if found := budget.get('measured'):
      measured = [amount(budget['kind'], found[name]) for name in ('dense', 'finished')]
      yield ' → '.join(measured), f'{budget["unit"]} measured in turn, {100 * found["ratio"]:.1f} % of dense'
  if rates := [e['tokens_per_second'] for e in data.of('train') if 'tokens_per_second' in e]:
    yield f'{statistics.median(rates):,.0f}', 'training tokens per second, median of the steps'
  if 'seconds' in report:
    yield f'{report["seconds"]:,.0f} s', f'of compute, {report["seconds"] / 60:,.0f} min'
  if compiles := report.get('compiles'):
    yield f'{sum(compiles.values())}', 'compiles: ' + ', '.join(f'{k} {v}' for k, v in compiles.items())


def _table(data: RunData) -> str:
  report, dense = data.report, known_perplexities(data.report).get('dense')
  names = ('stage', *cost_columns(report), 'perplexity pruned', 'recovered', 'tokens', 'seconds')
  rows = [['dense', *cost_cells(report), '', _decimal(dense), '', '']]
  for s in data.stages:
    row = [str(s['stage']), *cost_cells(report, s)]
    row += [_decimal(s.get('perplexity_pruned')), _decimal(s.get('perplexity_recovered'))]
    row += [_whole(s.get('tokens')), _whole(s.get('seconds'))]
    rows.append(row)
  return html_table([list(names), *rows])


def _example(example: ExampleReport) -> str:
  """A text's beginning, and what the dense model and the result write after it, side by side."""
  e = html.escape
  written = (('dense', example['dense']), ('result', example['result']))
  named = '' if example['text'] == TEXT else f'{example["text"]}: '
  boxes = [f'<span>{e(of)}</span><pre>{e(text)}</pre>' for of, text in written]
  return f'<p>{e(named)}… {e(example["prompt"])} …</p>' + cards('grid', boxes)


def _body(data: RunData, command: str, running: bool, written: str) -> Iterator[str]:
  report, trained, e = data.report, bool(data.of('train')), html.escape
  yield f'<h1>{e(_title(data))}</h1>'
  when = f' (page written {written})' if written else ''
  yield f'<p class="state">{e(_state(data, running) + when)}</p>'
  yield cards('facts', [f'<b>{e(figure)}</b><span>{e(what)}</span>' for figure, what in _facts(data)])
  yield f'<h2>Stages</h2><div class="card scroll">{_table(data)}</div>'
  if definition := report.get('perplexity', {}).get('definition'):
    yield f'<p>Perplexity is {e(definition)}.</p>'
  if len(texts := report.get('texts', {})) > 1:
    yield f'<h2>Texts</h2><div class="card scroll">{html_table(texts_rows(texts))}</div>'
  yield from (f'<p>{e(line)}</p>' for line in warnings(texts))
  if report.get('tasks'):
    yield f'<h2>Tasks</h2><div class="card scroll">{html_table(tasks_rows(report["tasks"]))}</div>'
  figures = [perplexity_over_tokens(data, text) for text in text_names(data)] if trained else []
  figures += [] if figures else [perplexity_chart(report)]
  figures += [excess_chart(report)]
  if trained:
    figures.append(training_chart(data, 'loss', 'Training loss', 'nats per token', 0))
    figures.append(training_chart(data, 'learning_rate', 'Learning rate', 'learning rate', 3))
  if any(figures):
    yield f'<h2>{"Recovery" if trained else "Perplexity"}</h2>' + cards('grid', figures)
  if data.of('prune'):
    yield '<h2>Pruning</h2>' + cards('grid', [budget_chart(data), *heat_maps(data)])
  if pairs := stage_widths(data):
    some = f' ({MOST_STAGES} of the stages)' if len(pairs) == MOST_STAGES < len(data.stages) else ''
    yield f'<h2>Widths of the layers{some}</h2>' + ''.join(
      cards('grid', row) for row in zip(*pairs, strict=True)
    )
  if examples := report.get('examples'):
    yield '<h2>Before and after</h2>'
    yield '<p>Held-out text, and how each model continues it with greedy decoding.</p>'
    yield ''.join(_example(example) for example in examples)
  if exports := report.get('exports'):
    yield f'<h2>Exports</h2><div class="card scroll">{html_table(_export_rows(exports))}</div>'
  if rows := _settings_rows(report):
    yield f'<h2>Settings</h2><div class="card scroll">{html_table(rows)}</div>'
  yield f'<h2>Command</h2><div class="card"><pre>{e(command)}</pre></div>'
  if versions := report.get('versions'):
    yield f'<p>{e(", ".join(f"{k} {v}" for k, v in versions.items()))}</p>'


def render(report: RunReport, events: list[Json], *, command: str, running: bool, written: str = '') -> str:
  """Returns the page as HTML.

  Args:
    report: as in report.json. During the run, all but `model.source` and `model.params_before` may be
      absent, and the last of `stages` may lack fields that are set after its pruning.
    events: the lines of metrics.jsonl.
    command: the command that reproduces the run.
    running: whether the run is in progress; the page then reloads automatically.
    written: the time of writing, shown to the reader.
  """
  data = RunData(report, events)
  title = f'{data.model["source"]} {_state(data, running)}'
  return page(title, '\n'.join(filter(None, _body(data, command, running, written))), running=running)


def write(
  path: str | pathlib.Path, report: RunReport, events: list[Json], *, command: str, running: bool
) -> None:
  """Writes `render(…)` atomically, with the time of writing."""
  now = time.strftime('%Y-%m-%d %H:%M:%S')
  write_text(path, render(report, events, command=command, running=running, written=now))
