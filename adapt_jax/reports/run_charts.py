"""The charts of `report.html`: perplexity, loss, parameters, importance and widths of a run."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from adapt_jax.config.values import TEXT
from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.report import (
  Of,
  RunReport,
  heads_of,
  importance_name,
  known_perplexities,
  layer_importance,
  names_of,
)
from adapt_jax.reports.summary import excess

Json = dict[str, Any]

MOST_STAGES = 9  # with charts of widths
_MOST_POINTS = 240  # of a curve; with more steps, points are means of neighbours


@dataclasses.dataclass(frozen=True)
class RunData:
  """A report and the events of its run, with helpers for the charts."""

  report: RunReport
  events: list[Json]

  def of(self, event: str) -> list[Json]:
    return [e for e in self.events if e['event'] == event]

  def x_of(self, step: int) -> int:
    """Tokens trained on after a step."""
    return step * self.report['schedule']['tokens_per_step']

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
    return {'marks': marks, 'x_range': (0, self.x_of(self.report['schedule']['train_steps']))}

  def widths(self) -> list[tuple[int, list[int], list[int]]]:
    """(stage, heads of `heads_of`, MLP channels) of the dense model, stage 0, and after each pruned stage."""
    dense, field = {'stage': 0} | self.report['model'], heads_of(self.report)[0]
    logged = {'num_heads': 'query_heads', 'num_kv_heads': 'kv_groups'}[field]
    widths: dict[Any, Any] = {e['stage']: (e[logged], e['ffn']) for e in self.of('prune')}
    widths |= {s['stage']: (s[field], s['ffn']) for s in (dense, *self.report['stages']) if 'ffn' in s}
    return [(stage, *widths[stage]) for stage in sorted(widths)]


def _wide(values: Sequence[float]) -> bool:
  """Whether a log axis suits the values better."""
  finite = [value for value in values if math.isfinite(value)]
  return 0 < 8 * min(finite, default=0) < max(finite, default=0)


def training_chart(data: RunData, field: str, title: str, unit: str, colour: int) -> str:
  """A field of the training steps; of a long run, means of neighbouring steps."""
  events = data.of('train')
  size = max(1, -(-len(events) // _MOST_POINTS))
  points = []
  for chunk in (events[i : i + size] for i in range(0, len(events), size)):
    points.append((data.x_of(chunk[-1]['step']), statistics.fmean(e[field] for e in chunk)))
  title += f' (means of {size} steps)' if size > 1 else ''
  series = [Series('', points, colour, 'curve')]
  return charts.line_chart(title, ('tokens', unit), series, **data.over_tokens())


def perplexity_over_tokens(data: RunData, text: str) -> str:
  """Perplexity on one text over tokens, after each pruning and recovery."""
  names = names_of(data.report)
  points: dict[str, list[tuple[float, float]]] = {'': [], names['pruned']: [], names['recovered']: []}
  levels = []
  for step, event in data.at_steps():
    if event['event'] == 'evaluate' and event.get('text', TEXT) == text:
      of, value = names[event['of']], event['perplexity']
      points[''].append((data.x_of(step), value))
      if of in points:
        points[of].append((data.x_of(step), value))
      else:
        levels.append((value, f'{of} {value:.2f}'))
  return charts.line_chart(
    'Perplexity on held-out text' + ('' if text == TEXT else f': {text}'),
    ('tokens', 'perplexity'),
    [Series(n, points[n], i, 'dots' if n else 'curve') for i, n in enumerate(points)],
    levels=levels,
    log=_wide([y for _, y in points['']]),
    **data.over_tokens(),
  )


def perplexity_chart(report: RunReport) -> str:
  """Pruned and recovered perplexity by stage, with a line for the dense model; '' if there is none."""
  stages, series, names = report.get('stages', []), [], names_of(report)
  models: tuple[Of, ...] = ('pruned', 'recovered')
  for colour, of in enumerate(models, 1):
    values: list[Any] = [(stage['stage'], stage.get(f'perplexity_{of}')) for stage in stages]
    series.append(Series(names[of], [(k, value) for k, value in values if value is not None], colour))
  dense = known_perplexities(report).get('dense')
  return charts.line_chart(
    'Perplexity on held-out text',
    ('stage', 'perplexity'),
    series,
    levels=[] if dense is None else [(dense, f'{names["dense"]} {dense:.2f}')],
    log=_wide([y for s in series for _, y in s.points]),
    integer=True,
  )


def excess_chart(report: RunReport) -> str:
  """Loss increase on each text after each stage; '' if there is only one text."""
  texts, series = report.get('texts', {}), []
  for colour, (name, text) in enumerate(texts.items() if len(texts) > 1 else ()):
    points = []
    for stage in report.get('stages', []):
      after: Any = {'dense': text.get('dense'), **stage.get('texts', {}).get(name, {})}
      if (lost := excess(after)) is not None:
        points.append((stage['stage'], lost))
    series.append(Series(name, points, colour))
  y_name = f'nats per token over {names_of(report)["dense"]}'
  return charts.line_chart('Loss increase by text', ('stage', y_name), series, integer=True)


def budget_chart(data: RunData) -> str:
  """The cost after each pruning step: the number of parameters, or that of another budget."""
  points, first = [(0, data.report['budget']['dense'])], dict[int, int]()
  for e in data.of('prune'):
    first.setdefault(e['stage'], e['step'] - 1)
    points.append((e['step'], e['cost'] if 'cost' in e else e['params']))
  targets = data.report['schedule']['targets']
  return charts.line_chart(
    'The budget and the targets of the stages',
    ('pruning step', data.report['budget']['unit']),
    [Series('', points, 0, 'step')],
    marks=[(step, f'stage {stage}') for stage, step in first.items()],
    levels=[(t, f'target {k}: {charts.number(float(f"{t:.4g}"))}') for k, t in enumerate(targets, 1)],
    integer=True,
  )


def width_charts(
  before: Sequence[list[int]],
  after: Sequence[list[int]],
  names: tuple[str, str],
  heads: str = 'KV heads',
  height: int = 180,
) -> tuple[str, str]:
  """Charts of (MLP channels, heads) by layer; before, after: (heads, MLP channels); heads: their title."""
  of_heads, of_mlp = (dict(zip(names, widths, strict=True)) for widths in zip(before, after, strict=True))
  mlp = charts.bar_chart(f'MLP channels, {names[1]}', 'channels', of_mlp, 0, height)
  title = f'{heads[0].upper()}{heads[1:]}, {names[1]}'
  return mlp, charts.bar_chart(title, heads, of_heads, 3, height)


def stage_widths(data: RunData) -> list[tuple[str, str]]:
  """The charts of each stage's widths, or of some stages of many."""
  widths, done, drawn = data.widths(), {s['stage'] for s in data.report['stages']}, []
  title, pairs = heads_of(data.report)[1], list(itertools.pairwise(widths))
  if len(pairs) > MOST_STAGES:  # evenly spaced, with the first and the last
    pairs = [pairs[i * (len(pairs) - 1) // (MOST_STAGES - 1)] for i in range(MOST_STAGES)]
  for (was, *before), (stage, *after) in pairs:
    now = f'after stage {stage}' if stage in done else f'stage {stage} so far'
    drawn.append(width_charts(before, after, (f'after stage {was}' if was else 'dense', now), title))
  return drawn


def heat_maps(data: RunData) -> list[str]:
  """What the method decided by, and the sparsity, by layer and step."""
  events, asked = data.of('prune'), data.report['prune'] or {}
  steps, distance, method = [e['step'] for e in events], asked.get('layer_distance', ''), asked['method']
  if events and events[0].get('layer_cost'):  # methods with one ranking over all layers
    importance = [e['layer_cost'] for e in events]
    unit = 'parameter' if data.report['budget']['kind'] == 'params' else 'unit of the budget'
    name = f'Median {f"cost per {unit}" if method == "obs" else "score"} of the groups of a layer'
  else:
    distance = 'cosine' if method == 'shortgpt' else distance
    importance = [layer_importance(distance, e['layer_importance']) for e in events]
    name = f'Importance of the layers{f": {importance_name(distance)}" if distance else ""}'
  sparsity = [e['sparsity'] for e in events]
  end = charts.axis_end(value for row in importance for value in row)
  return [
    charts.heat_map(name, importance, steps, most=end),
    charts.heat_map('Sparsity of the layers', sparsity, steps),
  ]
