"""Draws what training recovers: the loss increase on every text by training tokens, as one picture.

    python -m scripts.plot_tokens WORKDIR out.svg

WORKDIR is that of a sweep over train.tokens, such as configs/studies.py:tokens. The point at 0 tokens is the
pruned model. Loss increase is ln(perplexity / that of the dense model), in nats per token.
"""

import math
import pathlib
import sys

from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import write_text
from adapt_jax.reports import charts
from adapt_jax.reports.report import RunReport, read_report

_HEIGHT = 300


def draw(reports: list[RunReport]) -> str:
  """The picture as SVG, on white."""
  points: dict[str, dict[float, float]] = {}
  for report in reports:
    tokens = sum(stage['tokens'] for stage in report['stages'])
    for name, text in report['texts'].items():
      excess = {of: math.log(text[of] / text['dense']) for of in ('pruned', 'recovered')}
      points.setdefault(name, {0: excess['pruned']})[tokens] = excess['recovered']
  series = [
    charts.Series(name, sorted(of.items()), colour) for colour, (name, of) in enumerate(points.items())
  ]
  names, title = ('training tokens', 'loss increase, nats per token'), 'Loss increase by training tokens'
  return charts.line_chart(title, names, series, levels=[(0, 'dense')], height=_HEIGHT)


def main(arguments: list[str]) -> int:
  """Exit code 0, or 2 after one line on stderr."""
  if len(arguments) != 2:
    print('usage: python -m scripts.plot_tokens WORKDIR out.svg', file=sys.stderr)
    return 2
  try:
    files = sorted(pathlib.Path(arguments[0]).glob('cells/*/report.json'))
    with reading('cells of', arguments[0], 'all must be finished and recovered'):
      picture = draw([read_report(file) for file in files])
    if not picture:
      raise InputError(f'{arguments[0]} has no cells')
    write_text(arguments[1], picture)
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
