"""`report.html`: one page about a run, rewritten during the run; it needs only a browser.

It shows the contents of `report.json` and `metrics.jsonl`; what they do not have yet is absent.
"""

import html
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

from adapt_jax.config.build import flatten
from adapt_jax.config.units import amount
from adapt_jax.config.values import TEXT, plain
from adapt_jax.models.files import write_text
from adapt_jax.reports.page import cards, due, figures, notes, page, section
from adapt_jax.reports.report import ExampleReport, RunReport, known_perplexities, names_of
from adapt_jax.reports.run_charts import (
  MOST_STAGES,
  RunData,
  budget_chart,
  excess_chart,
  heat_maps,
  perplexity_chart,
  perplexity_over_tokens,
  stage_widths,
  training_chart,
)
from adapt_jax.reports.summary import budget_lines, decimal, health_lines, tables, warnings
from adapt_jax.reports.table import Table

Json = dict[str, Any]


def _state(data: RunData, running: bool) -> str:
  seen = [s['stage'] for s in (*data.report['stages'], *data.events) if 'stage' in s]
  count = max([1, len(data.report['schedule']['targets']), *seen])
  if not running:
    return f'finished, {count} stage{"s" if count > 1 else ""}'
  last: Json = data.events[-1] if data.events else {'event': ''}
  names: Any = names_of(data.report)
  doing = {
    'prune': f'pruning, step {last.get("step")} done',
    'train': f'recovering, training step {last.get("step")} of {data.report["schedule"]["train_steps"]} done',
    'evaluate': f'evaluated the model: {names.get(last.get("of"))}',
    'tasks': f'evaluated tasks: {names.get(last.get("of"))}',
  }
  return f'running, stage {max([1, *seen])} of {count}: {doing.get(last["event"], "starting")}'


def _title(data: RunData) -> str:
  """The model, and what was done to it."""
  model, rows = data.report['model'], (*data.report['stages'], *data.of('prune'))
  if not rows:
    return model['source']
  if data.report['prune'] is None:
    return f'{model["source"]}, distilled from {data.report["teacher"]["source"]}'
  kept = min(row['params'] for row in rows) / model['params_before']
  return f'{model["source"]}, pruned to {kept:.1%}{" and recovered" if data.of("train") else ""}'


def _exports(exports: dict[str, Json]) -> str:
  rows = []
  for name, of in exports.items():
    same = f'{of["logit_difference"]:.2g}', f'{of["same_token"]:.1%}'
    rows.append([name, of['type'], f'{of["bytes"] / 1e6:,.1f}', *same])
  head = ['export', 'type', 'MB', 'largest logit difference when read back', 'same token']
  return Table(head, rows).html() if rows else ''


def _facts(data: RunData) -> Iterator[tuple[str, str]]:
  """(figure, description) pairs of the header."""
  report, model, budget = data.report, data.report['model'], data.report['budget']
  if known := known_perplexities(report):
    names = names_of(report)
    yield ' → '.join(map(decimal, known.values())), f'perplexity {" → ".join(names[of] for of in known)}'
  before = report.get('teacher', model)['params_before']
  after = min([model['params_before'], *(row['params'] for row in (*report['stages'], *data.of('prune')))])
  yield (
    f'{before:,} → {after:,}',
    f'parameters, {100 * after / before:.1f} % {"left" if report["prune"] else "of the teacher"}',
  )
  if report['prune']:
    yield amount(budget['kind'], budget['reached']), '; '.join(budget_lines(budget))
  if rates := [e['tokens_per_second'] for e in data.of('train')]:
    yield f'{statistics.median(rates):,.0f}', 'training tokens per second, median of the steps'
  yield f'{report["seconds"]:,.0f} s', f'of compute, {report["seconds"] / 60:,.0f} min'


def _example(example: ExampleReport, dense: str) -> str:
  """A text's beginning or a question, and what the dense model and the result write, side by side.

  dense: what the page calls that model.
  """
  e = html.escape
  named = '' if example['text'] == TEXT else f'{example["text"]}: '
  shown = {dense: example['dense'], 'result': example['result']}
  boxes = [f'<span>{of}</span><pre>{e(text)}</pre>' for of, text in shown.items()]
  return f'<p>{e(named + example["prompt"])}</p>' + cards('grid', boxes)


def _charts(data: RunData) -> Iterator[str]:
  trained = bool(data.of('train'))
  texts = dict.fromkeys(event.get('text', TEXT) for event in data.of('evaluate'))
  measured = [perplexity_over_tokens(data, text) for text in texts] if trained else []
  if len(data.report['stages']) > 1:  # one point is no curve
    measured = [*(measured or [perplexity_chart(data.report)]), excess_chart(data.report)]
  if trained:
    measured.append(training_chart(data, 'loss', 'Training loss', 'nats per token', 0))
    measured.append(training_chart(data, 'learning_rate', 'Learning rate', 'learning rate', 3))
  yield section('Recovery' if trained else 'Perplexity', figures(measured))
  if data.of('prune'):
    yield section('Pruning', figures([budget_chart(data), *heat_maps(data)]))
  if data.report['prune'] and (pairs := stage_widths(data)):
    some = f' ({MOST_STAGES} of the stages)' if len(pairs) == MOST_STAGES < len(data.report['stages']) else ''
    yield section(f'Widths of the layers{some}', *map(figures, zip(*pairs, strict=True)))


def _body(data: RunData) -> Iterator[str]:
  report, e, shown = data.report, html.escape, tables(data.report)
  gained = [shown.pop(title).html() for title in ('Gain', 'Loss') if title in shown]
  speeds = [line for line in [report.get('gain', {}).get('measured')] if line]
  yield section('Gain and loss', *gained, notes([*health_lines(report.get('health')), *speeds]))
  yield cards('facts', [f'<b>{e(figure)}</b><span>{e(what)}</span>' for figure, what in _facts(data)])
  for title, table in shown.items():
    yield section(title, table.html())
  if definition := report['perplexity']['definition']:
    yield notes([f'Perplexity is {definition}.'])
  yield notes(warnings(report['texts'], report['prune'] is not None))
  yield from _charts(data)
  if examples := report.get('health', {}).get('examples', []):
    how = 'Questions, or beginnings of text, and how each model goes on with greedy decoding.'
    boxes = [_example(example, names_of(report)['dense']) for example in examples]
    yield section('Before and after', notes([how]), *boxes)
  yield section('Exports', _exports(report.get('exports', {})))
  settings = flatten({'prune': report['prune'] or {}, 'train': report.get('train') or {}})
  rows = [[name, plain(value)] for name, value in settings.items()]
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items() if count)
  settled = f'<div class="words">{Table(["setting", "value"], rows).html()}</div>'
  yield section('Settings', settled, notes([f'Compiles: {compiles}.']))


def render(report: RunReport, events: list[Json], *, command: str, running: bool) -> str:
  """Returns the page as HTML.

  Args:
    report: from `run_report`; the last of `stages` may lack fields that are set after its pruning.
    events: the lines of metrics.jsonl.
    command: the command that reproduces the run.
    running: whether the run is in progress; the page then reloads automatically.
  """
  data = RunData(report, events)
  made = {'command': command, 'versions': report.get('versions', {})}
  return page(_title(data), _state(data, running), _body(data), made, running=running)


def write(path: pathlib.Path, report: RunReport, events: list[Json], *, command: str, running: bool) -> None:
  """Writes `render(…)` atomically, if it is `due`."""
  if due(path, running):
    write_text(path, render(report, events, command=command, running=running))
