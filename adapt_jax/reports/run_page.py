"""`report.html`: one page about a run, rewritten during the run; it needs only a browser.

It shows the contents of `report.json` and `metrics.jsonl`; what they do not have yet is absent.
"""

import dataclasses
import html
import math
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from adapt_jax.config.build import flatten
from adapt_jax.config.values import TEXT
from adapt_jax.models.files import write_text
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.page import cards, html_table, page
from adapt_jax.reports.report import (
  ModelReport,
  RunReport,
  StageReport,
  TextReport,
  known_perplexities,
)
from adapt_jax.reports.summary import excess, tasks_rows, texts_rows, warning

Json = dict[str, Any]

_MOST_POINTS = 240  # of a curve; with more steps, points are means of neighbours
_MOST_COLUMNS = 64  # of a heat map
_MOST_STAGES = 9  # with charts of widths


def _decimal(value: float | None) -> str:
  return '–' if value is None else f'{value:,.2f}'


def _whole(value: float | None) -> str:
  return '–' if value is None else f'{value:,.0f}'


@dataclasses.dataclass(frozen=True)
class _Data:
  """A report and the events of its run, with helpers for the charts."""

  report: RunReport
  events: list[Json]

  def of(self, event: str) -> list[Json]:
    return [e for e in self.events if e['event'] == event]

  @property
  def model(self) -> ModelReport:
    return self.report['model']

  @property
  def stages(self) -> list[StageReport]:
    """The report's stages; the last may lack fields that are set after its pruning."""
    return self.report.get('stages', [])

  @property
  def settings(self) -> dict[str, Any]:
    """The settings of pruning."""
    return self.report.get('prune') or {}

  @property
  def schedule(self) -> Any:
    return self.report.get('schedule', {})

  @property
  def x_name(self) -> str:
    return 'tokens' if 'tokens_per_step' in self.schedule else 'training step'

  def x_of(self, step: int) -> int:
    """Tokens trained on after a step; the step itself if the report has no tokens per step."""
    return step * self.schedule.get('tokens_per_step', 1)

  def at_steps(self) -> Iterator[tuple[int, Json]]:
    """Every event with the training steps done by then, in the order of the log."""
    step = 0
    for event in self.events:
      step = event['step'] if event['event'] == 'train' else step
      yield step, event

  def over_tokens(self) -> Json:
    """Options shared by charts over tokens: the axis up to the end of the run, and marks at prunings."""
    first: dict[int, int] = {}
    for step, event in self.at_steps():
      if event['event'] == 'prune':
        first.setdefault(event['stage'], self.x_of(step))
    marks = [(x, f'prune {stage}') for stage, x in first.items()]
    return {'marks': marks, 'x_range': (0, self.x_of(self.schedule.get('train_steps', 0)))}

  def widths(self) -> list[tuple[int, list[int], list[int]]]:
    """(stage, KV heads, MLP channels) of the dense model, as stage 0, and after each pruned stage."""
    dense = {'stage': 0} | self.model
    found = {e['stage']: (e['kv_groups'], e['ffn']) for e in self.of('prune')}
    found |= {s['stage']: (s['num_kv_heads'], s['ffn']) for s in (dense, *self.stages) if 'ffn' in s}
    return [(stage, *found[stage]) for stage in sorted(found)]


# -- charts ------------------------------------------------------------------------------------------


def _spread(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the items, evenly spaced, including the first and the last."""
  if len(items) <= most:
    return list(items)
  return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _wide(points: Sequence[tuple[float, float, str]]) -> bool:
  """Whether a log axis suits the points better."""
  values = [p[1] for p in points if math.isfinite(p[1])]
  return 0 < 8 * min(values, default=0) < max(values, default=0)


def _training_chart(data: _Data, field: str, title: str, unit: str, colour: int) -> str:
  events = data.of('train')
  size = max(1, -(-len(events) // _MOST_POINTS))
  chunks: list[list[Json]] = []  # of neighbouring steps of one stage
  for event in events:
    if chunks and len(chunks[-1]) < size and chunks[-1][0]['stage'] == event['stage']:
      chunks[-1].append(event)
    else:
      chunks.append([event])
  points = []
  for chunk in chunks:
    first, last, mean = chunk[0]['step'], chunk[-1]['step'], sum(e[field] for e in chunk) / len(chunk)
    steps = f'step {last}' if first == last else f'mean of steps {first} to {last}'
    hover = f'stage {chunk[0]["stage"]}, {steps}, {data.x_of(last):,} {data.x_name}: {mean:.5g}'
    points.append((data.x_of(last), mean, hover))
  title += f' (means of {size} steps)' if size > 1 else ''
  return charts.line_chart(title, (data.x_name, unit), [Series('', points, colour)], **data.over_tokens())


def _texts(data: _Data) -> list[str]:
  """Names of the texts that perplexity is measured on, in order."""
  return list(dict.fromkeys(e.get('text', TEXT) for e in data.of('evaluate')))


def _perplexity_title(text: str) -> str:
  return 'Perplexity on held-out text' + ('' if text == TEXT else f': {text}')


def _perplexity_over_tokens(data: _Data, text: str) -> str:
  """Perplexity on one text over tokens, after each pruning and recovery."""
  points: dict[str, list[tuple[float, float, str]]] = {'': [], 'pruned': [], 'recovered': []}
  levels = []
  for step, event in data.at_steps():
    if event['event'] == 'evaluate' and event.get('text', TEXT) == text:
      of, value = event['of'], event['perplexity']
      points[''].append((data.x_of(step), value, ''))
      if of in points:
        points[of].append((data.x_of(step), value, f'stage {event["stage"]} {of}: {value:.3f}'))
      else:
        levels.append((value, f'{of} {value:.2f}'))
  return charts.line_chart(
    _perplexity_title(text),
    (data.x_name, 'perplexity'),
    [Series(n, points[n], i, 'dots' if n else 'line') for i, n in enumerate(points)],
    levels=levels,
    log=_wide(points['']),
    **data.over_tokens(),
  )


def perplexity_chart(report: RunReport, height: int = 250) -> str:
  """Pruned and recovered perplexity by stage, with a line for the dense model; '' if there is none."""
  series = []
  stages = report.get('stages', [])
  pruned = [(s['stage'], s.get('perplexity_pruned')) for s in stages]
  recovered = [(s['stage'], s.get('perplexity_recovered')) for s in stages]
  for colour, (name, rows) in enumerate((('pruned', pruned), ('recovered', recovered)), 1):
    points = [(k, value, f'stage {k} {name}: {value:.3f}') for k, value in rows if value is not None]
    series.append(Series(name, points, colour))
  dense = known_perplexities(report).get('dense')
  return charts.line_chart(
    'Perplexity on held-out text',
    ('stage', 'perplexity'),
    series,
    levels=[(dense, f'dense {dense:.2f}')] if dense is not None else [],
    log=_wide([p for s in series for p in s.points]),
    integer=True,
    height=height,
  )


def _excess_chart(report: RunReport) -> str:
  """Excess loss on each text after each stage; '' if there is only one text."""
  texts = report.get('texts', {})
  if len(texts) < 2:
    return ''
  series = []
  for colour, (name, text) in enumerate(texts.items()):
    points = []
    for stage in report.get('stages', []):
      after: TextReport = {**text, **stage.get('texts', {}).get(name, {})}
      if 'recovered' not in stage.get('texts', {}).get(name, {}):
        after.pop('recovered', None)
      if (lost := excess(after)) is not None:
        points.append((stage['stage'], lost, f'{name}, stage {stage["stage"]}: {lost:.3f}'))
    series.append(Series(name, points, colour % charts.COLOURS))
  title = 'Excess over the dense model by text'
  return charts.line_chart(title, ('stage', 'nats per token'), series, integer=True)


def _budget_chart(data: _Data) -> str:
  dense = data.model['params_before']
  points, first = [(0, dense, f'dense: {dense:,} parameters')], dict[int, int]()
  for e in data.of('prune'):
    first.setdefault(e['stage'], e['step'] - 1)
    share = f'{e["params"]:,} parameters, {100 * e["params"] / dense:.1f} %, calibration loss {e["loss"]:.3f}'
    points.append((e['step'], e['params'], f'stage {e["stage"]}, step {e["step"]}: {share}'))
  targets = data.schedule.get('targets', [s['target'] for s in data.stages])
  return charts.line_chart(
    'Parameters and the targets of the stages',
    ('pruning step', 'parameters'),
    [Series('', points, 0, 'step')],
    marks=[(step, f'stage {stage}') for stage, step in first.items()],
    levels=[
      (t, f'target {k}: {charts.labelled([float(f"{t:.4g}")])[0][1]}') for k, t in enumerate(targets, 1)
    ],
    integer=True,
  )


def width_charts(
  before: Sequence[list[int]], after: Sequence[list[int]], names: tuple[str, str], height: int = 180
) -> tuple[str, str]:
  """Charts of (MLP channels, KV heads) by layer; before, after: (KV heads, MLP channels)."""
  mlp = charts.bar_chart(f'MLP channels, {names[1]}', 'channels', before[1], after[1], names, 0, height)
  return mlp, charts.bar_chart(f'KV heads, {names[1]}', 'KV heads', before[0], after[0], names, 3, height)


def _stage_widths(data: _Data) -> list[tuple[str, str]]:
  widths, done, found = data.widths(), {s['stage'] for s in data.stages}, []
  for (was, *before), (stage, *after) in _spread(list(zip(widths, widths[1:], strict=False)), _MOST_STAGES):
    now = f'after stage {stage}' if stage in done else f'stage {stage} so far'
    found.append(width_charts(before, after, (f'after stage {was}' if was else 'dense', now)))
  return found


def _heat_maps(data: _Data) -> list[str]:
  events = _spread(data.of('prune'), _MOST_COLUMNS)
  steps, distance = [e['step'] for e in events], data.settings.get('layer_distance')
  importance, name = [e['layer_importance'] for e in events], 'Importance of the layers'
  if data.settings.get('method') == 'shortgpt' or distance == 'cosine':  # stored as -cos
    importance, name = [[1 + x for x in row] for row in importance], f'{name}: 1 - cos(input, output)'
  elif distance:
    name = f'{name}: {distance} distance of input and output'
  sparsity = [e['sparsity'] for e in events]
  return [
    charts.heat_map(name, importance, steps),
    charts.heat_map('Sparsity of the layers', sparsity, steps),
  ]


# -- text --------------------------------------------------------------------------------------------


def _state(data: _Data, running: bool) -> str:
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


def _title(data: _Data) -> str:
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


def _facts(data: _Data) -> Iterator[tuple[str, str]]:
  """(figure, description) pairs of the header."""
  model, report = data.model, data.report
  if known := known_perplexities(report):
    yield ' → '.join(map(_decimal, known.values())), f'perplexity {" → ".join(known)}'
  before = model['params_before']
  after = min([before, *(row['params'] for row in (*data.stages, *data.of('prune')))])
  target = f', target {model["params_target"]:,}' if 'params_target' in model else ''
  yield f'{before:,} → {after:,}', f'parameters, {100 * after / before:.1f} % left{target}'
  if rates := [e['tokens_per_second'] for e in data.of('train') if 'tokens_per_second' in e]:
    yield f'{statistics.median(rates):,.0f}', 'training tokens per second, median of the steps'
  if 'seconds' in report:
    yield f'{report["seconds"]:,.0f} s', f'of computing, {report["seconds"] / 60:,.0f} min'
  if compiles := report.get('compiles'):
    yield f'{sum(compiles.values())}', 'compiles: ' + ', '.join(f'{k} {v}' for k, v in compiles.items())


def _table(data: _Data) -> str:
  dense = data.model['params_before']
  names = ('stage', 'parameters', 'of dense', 'perplexity pruned', 'recovered', 'tokens', 'seconds')
  rows = [
    ['dense', f'{dense:,}', '100.0 %', '', _decimal(known_perplexities(data.report).get('dense')), '', '']
  ]
  for s in data.stages:
    row = [str(s['stage']), f'{s["params"]:,}', f'{100 * s["params"] / dense:.1f} %']
    row += [_decimal(s.get('perplexity_pruned')), _decimal(s.get('perplexity_recovered'))]
    row += [_whole(s.get('tokens')), _whole(s.get('seconds'))]
    rows.append(row)
  return html_table([list(names), *rows])


def _body(data: _Data, command: str, running: bool, written: str) -> Iterator[str]:
  report, trained, e = data.report, bool(data.of('train')), html.escape
  yield f'<h1>{e(_title(data))}</h1>'
  when = f' (page written {written})' if written else ''
  yield f'<p class="state">{e(_state(data, running) + when)}</p>'
  yield cards('facts', [f'<b>{e(figure)}</b><span>{e(what)}</span>' for figure, what in _facts(data)])
  yield f'<h2>Stages</h2><div class="card scroll">{_table(data)}</div>'
  if definition := report.get('perplexity', {}).get('definition'):
    yield f'<p>Perplexity is {e(definition)}.</p>'
  if len(texts := report.get('texts', {})) > 1:
    warned = f'<p>{e(text)}</p>' if (text := warning(texts)) else ''
    yield f'<h2>Texts</h2><div class="card scroll">{html_table(texts_rows(texts))}</div>{warned}'
  if report.get('tasks'):
    yield f'<h2>Tasks</h2><div class="card scroll">{html_table(tasks_rows(report["tasks"]))}</div>'
  figures = [_perplexity_over_tokens(data, text) for text in _texts(data)] if trained else []
  figures += [] if figures else [perplexity_chart(report)]
  figures += [_excess_chart(report)]
  if trained:
    figures.append(_training_chart(data, 'loss', 'Training loss', 'nats per token', 0))
    figures.append(_training_chart(data, 'learning_rate', 'Learning rate', 'learning rate', 3))
  if any(figures):
    yield f'<h2>{"Recovery" if trained else "Perplexity"}</h2>' + cards('grid', figures)
  if data.of('prune'):
    yield '<h2>Pruning</h2>' + cards('grid', [_budget_chart(data), *_heat_maps(data)])
  if pairs := _stage_widths(data):
    some = f' ({_MOST_STAGES} of the stages)' if len(pairs) == _MOST_STAGES < len(data.stages) else ''
    yield f'<h2>Widths of the layers{some}</h2>' + ''.join(
      cards('grid', row) for row in zip(*pairs, strict=True)
    )
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
  data = _Data(report, events)
  title = f'{data.model["source"]} {_state(data, running)}'
  return page(title, '\n'.join(filter(None, _body(data, command, running, written))), running=running)


def write(
  path: str | pathlib.Path, report: RunReport, events: list[Json], *, command: str, running: bool
) -> None:
  """Writes `render(…)` atomically, with the time of writing."""
  now = time.strftime('%Y-%m-%d %H:%M:%S')
  write_text(path, render(report, events, command=command, running=running, written=now))
