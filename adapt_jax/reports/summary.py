"""The table that a run prints at its end, and the rows of its tasks."""

from adapt_jax.reports.report import RunReport, Tasks


def _number(value: float | None) -> str:
  return '–' if value is None else f'{value:.2f}'


def _widths(values: list[int]) -> str:
  """Run lengths of a list of widths: '3×4 2 3×25'."""
  runs: list[list[int]] = []
  for value in values:
    if runs and runs[-1][0] == value:
      runs[-1][1] += 1
    else:
      runs.append([value, 1])
  return ' '.join(f'{v}×{n}' if n > 1 else str(v) for v, n in runs)


def table(report: RunReport) -> str:
  """The report for a reader: a row a stage, then widths, seconds and compiles."""
  model, perplexity = report['model'], report['perplexity']
  lines = [
    '',
    '| stage | parameters | of dense | perplexity pruned | recovered | tokens | seconds |',
    '|---|---|---|---|---|---|---|',
    f'| dense | {model["params_before"]:,} | 100.0 % | | {_number(perplexity["dense"])} | | |',
  ]
  for stage in report['stages']:
    share = 100 * stage['params'] / model['params_before']
    lines.append(
      f'| {stage["stage"]} | {stage["params"]:,} | {share:.1f} % | {_number(stage["perplexity_pruned"])} '
      f'| {_number(stage["perplexity_recovered"])} | {stage["tokens"]:,} | {stage["seconds"]:.0f} |'
    )
  if report.get('tasks'):
    lines += ['', tasks_table(report['tasks'])]
  lines.append('')
  for stage in report['stages']:
    lines.append(f'stage {stage["stage"]} KV heads by layer: {_widths(stage["num_kv_heads"])}')
    lines.append(f'stage {stage["stage"]} MLP widths by layer: {_widths(stage["ffn"])}')
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items())
  lines += [
    f'target {model["params_target"]:,} parameters, reached {model["params_after"]:,}',
    f'compiles: {compiles}; {report["seconds"]:.0f} s in all',
  ]
  return '\n'.join(lines)


def tasks_rows(tasks: Tasks) -> list[list[str]]:
  """Names of columns, then a row a task, from {'dense': scores of the harness, 'pruned': …}.

  Of a task's metrics acc_norm is shown, else acc, else what it names first; accuracies in percent.
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
  head, *rows = tasks_rows(tasks)
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (head, ['---'] * len(head), *rows))
