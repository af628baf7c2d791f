"""Draws what each token of recovery wins back: the excess on every text by training tokens, as one picture.

    python -m scripts.plot_tokens WORKDIR out.svg

WORKDIR is that of a grid over train.tokens, such as docs/results/tokens. The point at 0 tokens is the pruned
model. Excess is ln(perplexity / that of the dense model), in nats per token.
"""

import math
import pathlib
import sys

from adapt_jax.models.files import write_text
from adapt_jax.reports import charts
from adapt_jax.reports.report import RunReport, read_report

_HEIGHT = 300


def draw(reports: list[RunReport]) -> str:
  """The picture as SVG, on white. Raises ValueError if there is no recovered model."""
  points: dict[str, dict[int, float]] = {}
  for report in reports:
    for name, text in report['texts'].items():
      tokens = sum(stage['tokens'] for stage in report['stages'])
      found = points.setdefault(name, {})
      found.setdefault(0, math.log(text['pruned'] / text['dense']))
      found[tokens] = math.log(text['recovered'] / text['dense'])
  series = [
    charts.Series(name, [(x, y, f'{x:,} tokens: {y:.3f}') for x, y in sorted(found.items())], colour)
    for colour, (name, found) in enumerate(points.items())
  ]
  names = ('training tokens', 'excess, nats per token')
  chart = charts.line_chart(
    'What pruning cost, by tokens of recovery', names, series, levels=[(0, 'dense')], height=_HEIGHT
  )
  if not chart:
    raise ValueError('no cell of the grid has a recovered model')
  return charts.picture(chart)


def main(arguments: list[str]) -> int:
  """Exit code 0, or 2 after one line on stderr."""
  if len(arguments) != 2:
    print('usage: python -m scripts.plot_tokens WORKDIR out.svg', file=sys.stderr)
    return 2
  try:
    files = sorted(pathlib.Path(arguments[0]).glob('cells/*/report.json'))
    write_text(arguments[1], draw([read_report(file) for file in files]))
  except KeyError as error:
    print(f'error: a report has no {error}: all cells must be finished and recovered', file=sys.stderr)
    return 2
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
