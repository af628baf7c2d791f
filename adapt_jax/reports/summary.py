"""The table that a run prints at its end, and tables of its tasks and texts."""

import math

from adapt_jax.reports.report import RunReport, Tasks, TextReport

_LITTLE = 0.05  # nats per token: a difference too small for a warning


def _number(value: float | None) -> str:
  return '–' if value is None else f'{value:.2f}'


def _widths(values: list[int]) -> str:
  """Run lengths of a list of widths: '3 in 4 layers, 2, 3 in 25 layers'."""
  runs: list[list[int]] = []
  for value in values:
    if runs and runs[-1][0] == value:
      runs[-1][1] += 1
    else:
      runs.append([value, 1])
  return ', '.join(f'{v} in {n} layers' if n > 1 else str(v) for v, n in runs)


def table(report: RunReport) -> str:
  """The report as text: a table with a row per stage, then widths, compiles and seconds."""
  model, perplexity = report['model'], report['perplexity']
  lines = [
    '',
    '| stage | parameters | of dense | perplexity pruned | recovered | tokens | seconds |',
    '|---|---|---|---|---|---|---|',
    f'| dense | {model["params_before"]:,} | 100.0 % | | {_number(perplexity["dense"])} | | |',
  ]
  if 'params_trimmed' in model:
    size = model['params_trimmed']
    lines.append(
      f'| trimmed | {size:,} | {100 * size / model["params_before"]:.1f} % | '
      f'| {_number(perplexity.get("trimmed"))} | | |'
    )
  for stage in report['stages']:
    share = 100 * stage['params'] / model['params_before']
    lines.append(
      f'| {stage["stage"]} | {stage["params"]:,} | {share:.1f} % | {_number(stage["perplexity_pruned"])} '
      f'| {_number(stage["perplexity_recovered"])} | {stage["tokens"]:,} | {stage["seconds"]:.0f} |'
    )
  if len(report['texts']) > 1:
    lines += ['', _markdown(texts_rows(report['texts']))]
  if rows := bytes_rows(report['texts']):
    lines += ['', _markdown(rows)]
  if report.get('tasks'):
    lines += ['', tasks_table(report['tasks'])]
  lines.append('')
  for stage in report['stages']:
    lines.append(f'stage {stage["stage"]} KV heads by layer: {_widths(stage["num_kv_heads"])}')
    lines.append(f'stage {stage["stage"]} MLP widths by layer: {_widths(stage["ffn"])}')
    if 'hidden_size' in stage:
      lines.append(f'stage {stage["stage"]} residual stream: width {stage["hidden_size"]}')
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items())
  if 'vocab_trimmed' in model:
    lines.append(f'vocabulary: {model["vocab_trimmed"]:,} of {model["vocab_size"]:,} tokens')
  lines += [
    f'target {model["params_target"]:,} parameters, reached {model["params_after"]:,}',
    f'compiled programs: {compiles}; the run took {report["seconds"]:.0f} s',
  ]
  if warned := warning(report['texts']):
    lines.append(warned)
  return '\n'.join(lines)


def tasks_rows(tasks: Tasks) -> list[list[str]]:
  """Column names, then a row per task, from {'dense': scores of the harness, 'pruned': …}.

  A task is shown by acc_norm, else acc, else its first metric; accuracies are in percent.
  """
  first = next(iter(tasks.values()))
  rows = [['task', 'metric', 'questions', *tasks]]
  for task, scores in first.items():
    names = [name for name in scores if name not in ('version', 'n') and '_stderr' not in name]
    if not names:
      continue
    metric = next((name for name in ('acc_norm', 'acc') if name in names), names[0])
    scale = 100 if metric.startswith(('acc', 'exact_match')) else 1
    values = [_number(scale * found[task][metric]) for found in tasks.values()]
    rows.append([task, f'{metric}, %' if scale == 100 else metric, f'{scores["n"]:,}', *values])
  return rows


def tasks_table(tasks: Tasks) -> str:
  """`tasks_rows` as Markdown."""
  return _markdown(tasks_rows(tasks))


def texts_rows(texts: dict[str, TextReport]) -> list[list[str]]:
  """Column names, then a row per text: perplexities, the final excess loss, and the KL from dense."""
  rows = [['text', 'perplexity dense', 'pruned', 'recovered', 'excess', 'KL from dense']]
  for name, text in texts.items():
    values = [text.get('dense'), text.get('pruned'), text.get('recovered')]
    more = [excess(text), text.get('kl')]
    rows.append([name, *map(_number, values), *('–' if x is None else f'{x:.3f}' for x in more)])
  return rows


def bytes_rows(texts: dict[str, TextReport]) -> list[list[str]]:
  """Column names, then a row per text: bits per byte of each model; none if the vocabulary is whole."""
  rows = []
  for name, text in texts.items():
    if rates := text.get('tokens_per_byte'):
      values = [text.get('dense'), text.get('trimmed'), text.get('pruned'), text.get('recovered')]
      scales = [rates['dense'], *3 * [rates['trimmed']]]
      bits = [None if x is None else scale * math.log2(x) for x, scale in zip(values, scales, strict=True)]
      rows.append([name, *('–' if x is None else f'{x:.3f}' for x in bits)])
  head = ['text', 'bits per byte dense', 'trimmed', 'pruned', 'recovered']
  return [head, *rows] if rows else []


def excess(text: TextReport) -> float | None:
  """ln(perplexity of the final model / dense), nats per token.

  If the vocabulary was trimmed, the dense model is that with the trimmed one.
  """
  final, dense = text.get('recovered', text.get('pruned')), text.get('trimmed', text.get('dense'))
  return None if final is None or dense is None else math.log(final / dense)


def warning(texts: dict[str, TextReport]) -> str:
  """A warning line if some text lost more than twice as much as the best one; '' otherwise.

  The text that lost least is assumed to be of the kind used for calibration or training.
  """
  lost = {name: x for name, text in texts.items() if (x := excess(text)) is not None}
  if not lost:
    return ''
  best, worst = min(lost, key=lost.__getitem__), max(lost, key=lost.__getitem__)
  if lost[worst] < 2 * max(lost[best], 0.0) + _LITTLE:
    return ''
  return (
    f'warning: the model lost {lost[worst]:.3f} nats per token on {worst}, but {lost[best]:.3f} on {best}: '
    f'add text like {worst} to config.prune.calibration.source and config.train.source'
  )


def _markdown(rows: list[list[str]]) -> str:
  head, *rest = rows
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rest))
