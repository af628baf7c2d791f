"""`report.html`: one page about a run, rewritten while it goes on; needs nothing but a browser.

Shown is what `report.json` and `metrics.jsonl` say; what they do not say yet is absent.
"""

import dataclasses
import html
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from adapt_jax import charts
from adapt_jax.charts import Series
from models.files import write_text

_MOST_POINTS = 240  # of a curve, means of neighbouring steps beyond that
_MOST_COLUMNS = 64  # of a heat map
_MOST_STAGES = 8  # with charts of their widths
_REFRESH_SECONDS = 20

_PAGE_STYLE = """
:root{color-scheme:light dark;--ink:#1b2330;--muted:#586374;--line:#dce1e8;--paper:#fff;--ground:#f3f5f8}
@media (prefers-color-scheme:dark){
:root{--ink:#e6eaf0;--muted:#9aa7b8;--line:#333c49;--paper:#1a2029;--ground:#11151b}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:1400px;margin:auto;padding:16px}
h1{font-size:22px;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;margin:28px 0 8px}
p{margin:4px 0;color:var(--muted);overflow-wrap:anywhere}
.state{display:inline-block;margin:8px 0;padding:2px 10px;border-radius:99px;border:1px solid var(--line);
background:var(--paper);color:var(--ink)}
.grid,.facts{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.facts{grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr));margin:8px 0}
.card{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:10px;min-width:0}
.card b{display:block;font-size:20px;font-weight:600;font-variant-numeric:tabular-nums}
.card span{color:var(--muted);font-size:13px}
.chart{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;padding:0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{color:var(--muted);font-weight:500;font-size:13px}
tr:last-child td{border-bottom:0}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,monospace}
"""


def _escape(value: Any) -> str:
  return html.escape(str(value), quote=True)


def _decimal(value: float | None) -> str:
  return '–' if value is None else f'{value:.2f}'


@dataclasses.dataclass(frozen=True)
class _Data:
  """A report and the events of its run, with what the charts ask for."""

  report: dict[str, Any]
  events: list[dict[str, Any]]

  def of(self, event: str) -> list[dict[str, Any]]:
    return [e for e in self.events if e['event'] == event]

  @property
  def stages(self) -> list[dict[str, Any]]:
    """The report's rows; the last may lack what comes after its pruning."""
    return self.report.get('stages', [])

  @property
  def schedule(self) -> dict[str, Any]:
    return self.report.get('schedule', {})

  @property
  def stage_count(self) -> int:
    seen = [e['stage'] for e in self.events if 'stage' in e]
    return max([len(self.schedule.get('targets', [])), len(self.stages), *seen])

  def x_of(self, step: int) -> float:
    """Tokens trained on after a step; the step itself where the report does not say."""
    return step * self.schedule.get('tokens_per_step', 1)

  @property
  def x_name(self) -> str:
    return 'tokens' if 'tokens_per_step' in self.schedule else 'training step'

  @property
  def x_range(self) -> tuple[float, float]:
    return 0, self.x_of(self.schedule.get('train_steps', 0))

  def at_steps(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every event with the training steps done before it, by the order of the log."""
    step = 0
    for event in self.events:
      step = event['step'] if event['event'] == 'train' else step
      yield step, event

  def prunings(self) -> list[tuple[float, str]]:
    """Where on the axis of tokens each stage was pruned."""
    first: dict[int, int] = {}
    for step, event in self.at_steps():
      if event['event'] == 'prune':
        first.setdefault(event['stage'], step)
    return [(self.x_of(step), f'prune {stage}') for stage, step in first.items()]

  def widths(self) -> list[tuple[int, list[int], list[int]]]:
    """(stage, KV heads, MLP channels) of the dense model (stage 0) and after each stage that has been pruned."""
    model = self.report['model']
    found = {0: (model['num_kv_heads'], model['ffn'])} if 'ffn' in model else {}
    found |= {e['stage']: (e['kv_groups'], e['ffn']) for e in self.of('prune')}
    found |= {s['stage']: (s['num_kv_heads'], s['ffn']) for s in self.stages if 'ffn' in s}
    return [(stage, *found[stage]) for stage in sorted(found)]


# -- charts ------------------------------------------------------------------------------------------


def _chunks(data: _Data) -> list[list[dict[str, Any]]]:
  """Training events in runs of neighbours of one stage, few enough to draw."""
  events = data.of('train')
  size = -(-len(events) // _MOST_POINTS)
  found: list[list[dict[str, Any]]] = []
  for event in events:
    if found and len(found[-1]) < size and found[-1][0]['stage'] == event['stage']:
      found[-1].append(event)
    else:
      found.append([event])
  return found


def _training_chart(data: _Data, field: str, title: str, unit: str, colour: int) -> str:
  chunks = _chunks(data)
  points, hovers = [], []
  for chunk in chunks:
    value = sum(e[field] for e in chunk) / len(chunk)
    first, last = chunk[0]['step'], chunk[-1]['step']
    points.append((data.x_of(last), value))
    steps = f'step {last}' if first == last else f'mean of steps {first}–{last}'
    hovers.append(f'{steps}, stage {chunk[0]["stage"]}, {data.x_of(last):,} {data.x_name}: {value:.5g}')
  size = max(map(len, chunks), default=1)
  title += f' (means of {size} steps)' if size > 1 else ''
  series = [Series('', points, hovers, colour)]
  return charts.line_chart(title, data.x_name, unit, series, x_range=data.x_range, marks=data.prunings())


def _perplexity_over_tokens(data: _Data) -> str:
  """The sawtooth of prunings and recoveries."""
  found: dict[str, Series] = {
    name: Series(name, [], [], colour, 'dots') for colour, name in ((1, 'pruned'), (2, 'recovered'))
  }
  every, levels = Series('', [], [], 0), []
  for step, event in data.at_steps():
    if event['event'] == 'evaluate':
      kind = event['of'].split()[-1]
      point, hover = (data.x_of(step), event['perplexity']), f'{event["of"]}: {event["perplexity"]:.3f}'
      if kind == 'dense':
        levels.append((point[1], f'dense {point[1]:.2f}'))
      for series in (found.get(kind), every):
        if series:
          series.points.append(point)
          series.hovers.append(hover)
  values = [p[1] for p in every.points]
  log = bool(values) and min(values) > 0 and max(values) > 8 * min(values)
  title = 'Perplexity on held-out text' + (' (log)' if log else '')
  return charts.line_chart(
    title,
    data.x_name,
    'perplexity',
    [every, *found.values()],
    x_range=data.x_range,
    marks=data.prunings(),
    levels=levels,
    log=log,
  )


def perplexity_chart(report: dict[str, Any], height: int = 250) -> str:
  """Perplexity pruned and recovered by stage, with a line for the dense model."""
  series = []
  for colour, name in ((1, 'pruned'), (2, 'recovered')):
    rows = [(s['stage'], s.get(f'perplexity_{name}')) for s in report.get('stages', [])]
    points = [(stage, value) for stage, value in rows if value is not None]
    series.append(Series(name, points, [f'stage {s} {name}: {v:.3f}' for s, v in points], colour))
  dense = report.get('perplexity', {}).get('dense')
  return charts.line_chart(
    'Perplexity on held-out text',
    'stage',
    'perplexity',
    [s for s in series if s.points],
    levels=[(dense, f'dense {dense:.2f}')] if dense is not None else [],
    integer=True,
    height=height,
  )


def _budget_chart(data: _Data) -> str:
  events = data.of('prune')
  dense = data.report['model']['params_before']
  points = [(0, dense)] + [(e['step'], e['params']) for e in events]
  hovers = ['dense'] + [f'step {e["step"]}, stage {e["stage"]}' for e in events]
  hovers = [
    f'{h}: {p[1]:,} parameters, {100 * p[1] / dense:.1f} %' for h, p in zip(hovers, points, strict=True)
  ]
  rows = [s['target'] for s in data.stages]
  targets = data.schedule.get('targets', rows)
  levels = [(t, f'target {k}: {t / 1e6:,.1f}M') for k, t in enumerate(targets, 1)]
  firsts: dict[int, int] = {}
  for e in events:
    firsts.setdefault(e['stage'], e['step'] - 1)
  return charts.line_chart(
    'Parameters and the targets of the stages',
    'pruning step',
    'parameters',
    [Series('', points, hovers, 0, 'step')],
    marks=[(step, f'stage {stage}') for stage, step in firsts.items()],
    levels=levels,
    integer=True,
  )


def width_charts(
  title: str,
  before: Sequence[Sequence[int]],
  after: Sequence[Sequence[int]],
  names: tuple[str, str],
  height: int = 180,
) -> list[str]:
  """(KV heads, MLP channels) of every layer before and after, a chart each."""
  return [
    charts.bar_chart(f'{title}{name}', unit, now, then, colour=colour, names=names, height=height)
    for colour, name, unit, then, now in (
      (3, 'KV heads', 'KV heads', before[0], after[0]),
      (0, 'MLP channels', 'channels', before[1], after[1]),
    )
  ]


def _spread(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the items, evenly, the first and the last among them."""
  if len(items) <= most:
    return list(items)
  return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def _all_width_charts(data: _Data) -> list[str]:
  widths = data.widths()
  pairs = _spread(list(zip(widths, widths[1:], strict=False)), _MOST_STAGES)
  found = []
  for (_, *before), (stage, *after) in pairs:
    found += width_charts(f'Stage {stage}: ', before, after, ('after', 'before'))
  return found


def _heat_maps(data: _Data) -> list[str]:
  events = _spread(data.of('prune'), _MOST_COLUMNS)
  steps = [e['step'] for e in events]
  return [
    charts.heat_map(
      'Layer importance (coloured by rank)', [e['layer_importance'] for e in events], steps, by_rank=True
    ),
    charts.heat_map('Sparsity of the layers', [e['sparsity'] for e in events], steps),
  ]


# -- text --------------------------------------------------------------------------------------------


def _state(data: _Data, running: bool) -> str:
  count = data.stage_count
  if not running:
    return f'finished: {count} {"stage" if count == 1 else "stages"}'
  last = data.events[-1] if data.events else {}
  stage = max([1, *(e['stage'] for e in data.events if 'stage' in e)])
  doing = {
    'prune': f'pruning, step {last.get("step")} done',
    'train': f'recovering, training step {last.get("step")} of {data.schedule.get("train_steps", "?")} done',
    'evaluate': f'{last.get("of")} evaluated',
  }.get(last.get('event', ''), 'starting')
  return f'running: stage {stage} of {count}, {doing}'


def _facts(data: _Data) -> list[tuple[str, str]]:
  """(figure, what it is) of the header."""
  model, perplexity = data.report['model'], data.report.get('perplexity', {})
  facts = []
  if any(perplexity.get(k) is not None for k in ('dense', 'pruned', 'recovered')):
    shown = [k for k in ('dense', 'pruned', 'recovered') if perplexity.get(k) is not None]
    facts.append((' → '.join(_decimal(perplexity[k]) for k in shown), f'perplexity {" → ".join(shown)}'))
  before, after = model['params_before'], model.get('params_after')
  if after is None and data.stages:
    after = data.stages[-1]['params']
  figure, what = f'{before:,}', 'parameters'
  if after is not None:
    figure += f' → {after:,}'
    what += f' before → after: {100 * after / before:.1f} %'
  facts.append((figure, what + (f' (target {model["params_target"]:,})' if 'params_target' in model else '')))
  if 'seconds' in data.report:
    seconds = data.report['seconds']
    facts.append((f'{seconds:,.0f} s', f'of computing ({seconds / 60:.0f} min)'))
  if compiles := data.report.get('compiles'):
    facts.append(
      (str(sum(compiles.values())), 'compiles: ' + ', '.join(f'{k} {v}' for k, v in compiles.items()))
    )
  return facts


def _table(data: _Data) -> str:
  model = data.report['model']
  head = ('stage', 'parameters', 'of dense', 'perplexity pruned', 'recovered', 'tokens', 'seconds')
  dense = data.report.get('perplexity', {}).get('dense')
  rows = [('dense', f'{model["params_before"]:,}', '100.0 %', '', _decimal(dense), '', '')]
  for s in data.stages:
    rows.append(
      (
        str(s['stage']),
        f'{s["params"]:,}',
        f'{100 * s["params"] / model["params_before"]:.1f} %',
        _decimal(s.get('perplexity_pruned')),
        _decimal(s.get('perplexity_recovered')),
        f'{s["tokens"]:,}' if 'tokens' in s else '–',
        f'{s["seconds"]:,.0f}' if 'seconds' in s else '–',
      )
    )
  lines = [''.join(f'<th>{_escape(c)}</th>' for c in head)]
  lines += [''.join(f'<td>{_escape(c)}</td>' for c in row) for row in rows]
  return '<table>' + '\n'.join(f'<tr>{line}</tr>' for line in lines) + '</table>'


def _section(title: str, figures: Sequence[str], note: str = '') -> str:
  cards = ''.join(f'<div class="card">{f}</div>' for f in figures if f)
  if not cards:
    return ''
  return (
    f'<h2>{_escape(title)}</h2>'
    + (f'<p>{_escape(note)}</p>' if note else '')
    + f'<div class="grid">{cards}</div>'
  )


def _body(data: _Data, command: str, running: bool) -> Iterator[str]:
  report, trained = data.report, bool(data.of('train'))
  yield f'<h1>{_escape(report["model"]["source"])}</h1>'
  yield f'<div class="state">{_escape(_state(data, running))}</div>'
  if running and 'written' in report:
    yield f'<p>Written {_escape(report["written"])}; reloads by itself.</p>'
  facts = ''.join(
    f'<div class="card"><b>{_escape(f)}</b><span>{_escape(w)}</span></div>' for f, w in _facts(data)
  )
  yield f'<div class="facts">{facts}</div>'
  if definition := report.get('perplexity', {}).get('definition'):
    yield f'<p>Perplexity: {_escape(definition)}.</p>'
  yield f'<h2>Stages</h2><div class="card scroll">{_table(data)}</div>'
  perplexity = _perplexity_over_tokens(data) if trained else perplexity_chart(report)
  loss = _training_chart(data, 'loss', 'Training loss', 'nats per token', 0)
  rate = _training_chart(data, 'learning_rate', 'Learning rate', 'learning rate', 3)
  yield _section('Recovery' if trained else 'Perplexity', [perplexity, loss, rate])
  note = 'Point at a mark to read its value. Importance: larger is more important.'
  yield _section('Pruning', [_budget_chart(data), *_heat_maps(data)] if data.of('prune') else [], note)
  yield _section('Widths of the layers', _all_width_charts(data))
  yield f'<h2>Reproduce</h2><div class="card"><pre>{_escape(command)}</pre></div>'
  if versions := report.get('versions'):
    yield f'<p>{_escape(", ".join(f"{k} {v}" for k, v in versions.items()))}</p>'


def render(report: dict[str, Any], events: list[dict[str, Any]], *, command: str, running: bool) -> str:
  """The page.

  Args:
    report: as in report.json. While the run goes on all but `model.source` and `model.params_before` may
      be absent, and the last of `stages` may lack what follows its pruning.
    events: the lines of metrics.jsonl.
    command: that reproduces the run.
    running: whether the run goes on; the page then reloads by itself.
  """
  data = _Data(report, events)
  refresh = f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}">\n' if running else ''
  dark = f'@media (prefers-color-scheme:dark){{\n{charts.style(charts.DARK)}}}'
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
    f'{refresh}<title>{_escape(report["model"]["source"])}</title>\n'
    f'<style>{_PAGE_STYLE}{charts.style(charts.LIGHT)}\n{dark}</style>\n</head>\n<body>\n<main>\n'
    + '\n'.join(filter(None, _body(data, command, running)))
    + '\n</main>\n</body>\n</html>\n'
  )


def write(
  path: str | pathlib.Path,
  report: dict[str, Any],
  events: list[dict[str, Any]],
  *,
  command: str,
  running: bool,
) -> None:
  """Writes `render(…)` whole: a reader sees the old page or the new."""
  stamp = {'written': time.strftime('%Y-%m-%d %H:%M:%S')}
  write_text(path, render(report | stamp, events, command=command, running=running))
