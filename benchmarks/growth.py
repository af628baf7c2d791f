"""How the cost of a pruning step (scoring) and of a training step grows with tokens, layers and hidden size.

    python -m benchmarks.growth [--rounds=2] [--write]

The models are random, with 1 to 50 million parameters; one size is doubled three times, the others are fixed.
Exponents are slopes of log cost over log size, one fit per round. About four minutes on two cores. There is
no peer; the limit is the same fit on the FLOPs of the same sizes. --write also draws benchmarks/growth.svg.
"""

import json
import math
import statistics
import sys
from typing import Any

from adapt_jax.reports import charts
from benchmarks.side_by_side import ROOT, in_turn, parser, report, spread

PROGRAMS = ('scoring', 'training')
BASE = {'tokens': 1024, 'layers': 4, 'hidden': 512}
SWEEPS = {
  'tokens': (1024, 2048, 4096, 8192),
  'layers': (2, 4, 8, 16),
  'hidden': (128, 256, 512, 1024),
}
REPEATS = 3
PICTURE = ROOT / 'benchmarks/growth.svg'
# Of planned bytes as one size grows to infinity: all tokens' activations, all layers', and weights [D, D].
BYTES_LIMIT = {'tokens': 1, 'layers': 1, 'hidden': 2}

Rounds = list[list[dict[str, float]]]


def exponent(sizes: tuple[int, ...], costs: list[float]) -> float:
  """b of cost = a · size^b, by least squares of the logarithms."""
  return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in costs]).slope


def points() -> list[dict[str, int]]:
  """All sizes, without duplicates."""
  found = [BASE | {name: size} for name, sizes in SWEEPS.items() for size in sizes]
  return [p for i, p in enumerate(found) if p not in found[:i]]


def measure(rounds: int) -> dict[str, Rounds]:
  """By program, round and point: seconds, cpu, bytes, flops."""
  sizes = json.dumps(points())
  command = [sys.executable, '-m', 'benchmarks.programs.growth_points']
  runs = in_turn({name: [*command, name, sizes, str(REPEATS)] for name in PROGRAMS}, rounds)
  return {name: [run.answer['points'] for run in runs[name]] for name in PROGRAMS}


def along(name: str, rounds: Rounds, what: str) -> list[list[float]]:
  """Costs of one sweep, one list per round."""
  order = [points().index(BASE | {name: size}) for size in SWEEPS[name]]
  return [[round_[i][what] for i in order] for round_ in rounds]


def table(found: dict[str, Rounds]) -> str:
  lines = [
    '| step | grows with | seconds | last doubling | CPU seconds | limit: FLOPs | planned bytes '
    '| last doubling | limit |',
    '|---' * 9 + '|',
  ]
  for program, rounds in found.items():
    for name, sizes in SWEEPS.items():

      def fits(what: str, name: str = name, rounds: Rounds = rounds, sizes: Any = sizes) -> list[float]:
        return [exponent(sizes, costs) for costs in along(name, rounds, what)]

      def last(what: str, name: str = name, rounds: Rounds = rounds, sizes: Any = sizes) -> list[float]:
        return [exponent(sizes[-2:], costs[-2:]) for costs in along(name, rounds, what)]

      cells = [spread(fits('seconds')), spread(last('seconds')), spread(fits('cpu'))]
      cells += [f'{fits("flops")[0]:.2f}', f'{fits("bytes")[0]:.2f}', f'{last("bytes")[0]:.2f}']
      cells.append(str(BYTES_LIMIT[name]))
      lines.append(f'| {program} | {name}, {sizes[0]:,}–{sizes[-1]:,} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def chart(found: dict[str, Rounds]) -> str:
  """Median seconds of every sweep as multiples of those at its smallest size."""
  series = []
  for program, rounds in found.items():
    for colour, (name, sizes) in enumerate(SWEEPS.items()):
      medians = [statistics.median(costs) for costs in zip(*along(name, rounds, 'seconds'), strict=True)]
      marks = [
        (float(i), y / medians[0], f'{program}, {x:,} {name}: {y:.3g} s')
        for i, (x, y) in enumerate(zip(sizes, medians, strict=True))
      ]
      series.append(charts.Series(f'{program}, {name}', marks, colour, dashed=program == 'training'))
  longest = max(len(sizes) for sizes in SWEEPS.values())
  return charts.line_chart(
    'Seconds of a step against its size',
    ('size, times the smallest', 'seconds, times the smallest'),
    series,
    log=True,
    categories=[f'×{2**i}' for i in range(longest)],
    height=320,
  )


def main(arguments: list[str] | None = None) -> None:
  args = parser(__doc__, 2).parse_args(arguments)
  found = measure(args.rounds)
  base = ', '.join(f'{size:,} {name}' for name, size in BASE.items())
  text = (
    f'Exponents b of cost = a · size^b, fitted over sizes that double, the others at {base}; rows of 128 '
    f'tokens, fp32; {args.rounds} rounds, each the medians of {REPEATS} steps: median (lowest–highest) of '
    "the fits. Planned bytes: the compiler's plan, weights included. The limit of seconds is the same fit on "
    'the FLOPs of these sizes; that of bytes, where the size grows for ever. Training has all rows in one '
    'micro-batch here; scoring takes 8 rows through a layer at once.'
  )
  picture = '![Seconds of a step against tokens, layers and hidden size](growth.svg)'
  if args.write:
    PICTURE.write_text(charts.picture(chart(found)), encoding='utf-8')
  report('Growth of the cost', '\n\n'.join([text, table(found), picture]), args.write)


if __name__ == '__main__':
  main()
