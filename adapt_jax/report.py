"""`report.json` and the table that a run prints at its end."""

import importlib.metadata
import platform
from typing import Any

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers', 'numpy')


def versions() -> dict[str, str]:
  """Versions of Python and of the libraries that decide a run's figures."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'python': platform.python_version()} | found


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


def table(report: dict[str, Any], hf_directory: str) -> str:
  """The report for a reader: a row a stage, then widths, seconds, compiles and where things lie."""
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
  lines.append('')
  for stage in report['stages']:
    lines.append(f'stage {stage["stage"]} KV heads by layer: {_widths(stage["num_kv_heads"])}')
    lines.append(f'stage {stage["stage"]} MLP widths by layer: {_widths(stage["ffn"])}')
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items())
  lines += [
    f'target {model["params_target"]:,} parameters, reached {model["params_after"]:,}',
    f'compiles: {compiles}; {report["seconds"]:.0f} s in all',
    f'weights for transformers: {hf_directory}',
  ]
  return '\n'.join(lines)
