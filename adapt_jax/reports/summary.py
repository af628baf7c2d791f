"""The table that a run prints at its end, and tables of its tasks and texts."""

import math
from typing import Any

from adapt_jax.config.targets import parse
from adapt_jax.config.units import amount, duration
from adapt_jax.config.values import OWN
from adapt_jax.reports.report import (
  PRUNING_NAMES,
  BudgetReport,
  HealthReport,
  Of,
  RunReport,
  StageReport,
  Tasks,
  TextReport,
  known_perplexities,
  names_of,
)
from adapt_jax.reports.table import Table

# A cost in `GainReport` -> its title, and how its number is shown: divided by the scale, and in this format.
_COSTS = {
  'weights': ('weights in {dtype}, MB', 1e6, ',.1f'),
  'decode': ('decode, tokens/s', 1, ',.1f'),
  'prefill': ('prefill, tokens/s', 1, ',.0f'),
  'kv_cache': ('KV cache, bytes per token', 1, ',.0f'),
}
_LITTLE = 0.05  # nats per token: a difference too small for a warning


def decimal(value: float | None, form: str = ',.2f') -> str:
  """The value; '–' if it is not known."""
  return '–' if value is None else format(value, form)


def stages_table(report: RunReport) -> Table:
  """A row for the dense model and for each stage, as far as they are known."""
  other = [] if report['budget']['kind'] == 'params' else [report['budget']['unit'], 'of dense']
  dense, before, after = names_of(report).values()
  trained = [after, 'tokens'] if report['schedule']['train_steps'] else []
  perplexity = f'perplexity {before}' if trained else 'perplexity'
  head = ['stage', 'parameters', f'of {dense}', *other, perplexity, *trained, 'seconds']
  start = decimal(known_perplexities(report).get('dense'))
  rows = [[dense, *_costs(report), start, *['' for _ in trained], '']]
  for stage in report['stages']:
    row = [str(stage['stage']), *_costs(report, stage), decimal(stage.get('perplexity_pruned'))]
    if trained:
      row += [decimal(stage.get('perplexity_recovered')), decimal(stage.get('tokens'), ',.0f')]
    rows.append([*row, decimal(stage.get('seconds'), ',.0f')])
  return Table(head, rows)


def gain_table(report: RunReport) -> Table:
  """A row for each cost of the dense model and the result; no rows before they are known."""
  rows: list[list[str]] = []
  gain: Any = report.get('gain') or {'dense': {}, 'result': {}}
  for field, (title, scale, form) in _COSTS.items():
    before, after = (gain[of].get(field) for of in ('dense', 'result'))
    if before and after:
      numbers = [format(value / scale, form) for value in (before, after)]
      rows.append([title.format(dtype=gain['dtype']), *numbers, f'{100 * (after / before - 1):+.0f} %'])
  return Table(['', names_of(report)['dense'], 'result', 'change'], rows)


def tables(report: RunReport) -> dict[str, Table]:
  """Title -> table, those that have rows: what was gained and lost, the stages and tasks."""
  names = names_of(report)
  shown = {'Gain': gain_table(report), 'Loss': texts_table(report['texts'], names)}
  shown['Stages'] = stages_table(report)
  tasks: Tasks = {names[of]: scores for of, scores in (report.get('tasks') or {}).items()}  # type: ignore[index]
  shown |= {'Tasks': tasks_table(tasks)} if tasks else {}
  return {title: table for title, table in shown.items() if table.rows}


def table(report: RunReport) -> str:
  """The report as text: its tables, then health, the target and the time."""
  lines = [line for shown in tables(report).values() for line in ('', shown.markdown())]
  asked = budget_lines(report['budget']) if report['prune'] else []
  lines += ['', *health_lines(report.get('health')), *asked, f'the run took {duration(report["seconds"])}']
  return '\n'.join([*lines, *warnings(report['texts'], report['prune'] is not None)])


def health_lines(health: HealthReport | None) -> list[str]:
  """'answers, dense → result: usable 27 → 21 of 40; repeating 5 % → 12 %'; none if it was not measured."""
  if health is None:
    return []
  models = {of: health[of] for of in ('dense', 'result') if of in health}
  title = f'answers, {" → ".join(models)}' if len(models) > 1 else 'answers'
  parts = ['repeating ' + ' → '.join(f'{100 * of["repetition"]:.0f} %' for of in models.values())]
  if 'usable' in health['dense']:
    usable = ' → '.join(str(of['usable']) for of in models.values())
    parts.insert(0, f'usable {usable} of {health["answers"]}')
  return [f'{title}: {"; ".join(parts)}']


def _costs(report: RunReport, stage: StageReport | None = None) -> list[str]:
  """Parameters of a stage or the dense model, and the cost of another budget; each with its share of it."""
  dense, budget = report.get('teacher', report['model'])['params_before'], report['budget']
  params = stage['params'] if stage else dense
  cells = [f'{params:,}', f'{100 * params / dense:.1f} %']
  if budget['kind'] == 'params':
    return cells
  cost = stage['cost'] if stage else budget['dense']
  return [*cells, amount(budget['kind'], cost), f'{100 * cost / budget["dense"]:.1f} %']


def budget_lines(budget: BudgetReport) -> list[str]:
  """What was asked, what the last stage reached and, of a time or a file, what was measured."""
  kind, dense, written = budget['kind'], budget['dense'], budget.get('target', '')
  asked, reached = (amount(kind, budget[name]) for name in ('asked', 'reached'))
  if kind == 'params':
    return [f'target {asked} {budget["unit"]}, reached {reached}']
  shares = [f'{100 * budget[name] / dense:.1f} %' for name in ('asked', 'reached')]
  unit = budget['unit']
  lines = [f'target {asked} {unit} ({shares[0]} of dense), reached {reached} ({shares[1]})']
  found = budget.get('measured', {})
  if found and kind != 'file':
    before, after = (amount(kind, found[name]) for name in ('dense', 'finished'))
    share = f'{100 * found["ratio"]:.1f} % of dense'
    lines.append(f'measured in turn on this machine: dense {before} {unit}, finished {after}, {share}')
  if found and written and not parse(written).share:
    wanted, value = budget['asked'], found['finished']
    if kind == 'decode':
      unit, wanted, value = 'tok/s', parse(written).value, found['tokens_per_second']
    off = f'{100 * (value / wanted - 1):+.1f} %'
    lines.append(f'asked {written}, measured {amount(kind, value)} {unit} ({off})')
  return lines


def tasks_table(tasks: Tasks) -> Table:
  """A row per task, from {'dense': scores of the harness, 'pruned': …}.

  A task is shown by acc_norm, else acc, else its first metric; accuracies are in percent.
  """
  rows = []
  for task, scores in next(iter(tasks.values())).items():
    names = [name for name in scores if name not in ('version', 'n') and '_stderr' not in name]
    if not names:
      continue
    metric = next((name for name in ('acc_norm', 'acc') if name in names), names[0])
    scale = 100 if metric.startswith(('acc', 'exact_match')) else 1
    values = [decimal(scale * of[task][metric]) for of in tasks.values()]
    rows.append([task, f'{metric}, %' if scale == 100 else metric, f'{scores["n"]:,}', *values])
  return Table(['task', 'metric', 'questions', *tasks], rows)


def texts_table(texts: dict[str, TextReport], names: dict[Of, str] = PRUNING_NAMES) -> Table:
  """A row per text: perplexities that some have, the final increase of the loss, the KL from dense."""
  measured = {of: name for of, name in names.items() if of == 'dense' or any(of in x for x in texts.values())}
  rows = []
  for name, text in texts.items():
    more = excess(text), text.get('kl')
    rows.append([name, *(decimal(text.get(of)) for of in measured), *(decimal(x, '.3f') for x in more)])
  dense, *others = measured.values()
  return Table(['text', f'perplexity {dense}', *others, 'loss increase', f'KL from {dense}'], rows)


def excess(text: TextReport) -> float | None:
  """ln(perplexity of the final model / dense), nats per token."""
  final, dense = text.get('recovered', text.get('pruned')), text.get('dense')
  return None if final is None or dense is None else math.log(final / dense)


def warnings(texts: dict[str, TextReport], pruned: bool = True) -> list[str]:
  """Lines about what a user should not overlook; empty if there is nothing. pruned: whether the run did."""
  return [line for line in (_uneven(texts, pruned), _worsened(texts, pruned)) if line]


def _worsened(texts: dict[str, TextReport], pruned: bool) -> str:
  """A warning if training made the model worse on some text; '' otherwise."""
  pairs = {
    name: (x['pruned'], x['recovered']) for name, x in texts.items() if {'pruned', 'recovered'} <= x.keys()
  }
  lost = {name: math.log(after / before) for name, (before, after) in pairs.items()}
  if not lost or max(lost.values()) < _LITTLE:
    return ''
  worst = max(lost, key=lost.__getitem__)
  before, after = pairs[worst]
  return (
    f'warning: training raised the perplexity on {worst} from {before:.2f} to {after:.2f}: lower '
    f'train.lr, and train on more tokens{", or use --mode=prune" * pruned}'
  )


def _uneven(texts: dict[str, TextReport], pruned: bool) -> str:
  """A warning if some text lost more than twice as much as the best one; '' otherwise.

  The text that lost least is assumed to be of the kind used for calibration or training.
  """
  lost = {name: x for name, text in texts.items() if (x := excess(text)) is not None}
  if not lost:
    return ''
  best, worst = min(lost, key=lost.__getitem__), max(lost, key=lost.__getitem__)
  if lost[worst] < 2 * max(lost[best], 0.0) + _LITTLE:
    return ''
  remedy = f'add text like {worst} to {"prune.calibration.source and " * pruned}train.source'
  remedy = 'raise prune.calibration.own' if worst == OWN and pruned else remedy
  return (
    f'warning: the model lost {lost[worst]:.3f} nats per token on {worst}, but {lost[best]:.3f} on {best}: '
    f'{remedy} (docs/texts.md says what helps if you have none)'
  )
