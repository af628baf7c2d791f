"""Whether to pad neighbouring layers to one width, so that one compiled layer serves them all.

    python -m benchmarks.equal_layers --head_dim=64 RUN [RUN ...]

RUN is the workdir of a finished run. A program with a loop over each run of equal layers compiles in about
the time of as many layers as there are runs. This prints, for a number of runs, the least extra arithmetic in
the layers' projections if the pruned layers are divided into so many runs of neighbours, each padded to its
widest. Both are shares: of the layers to compile, and of the arithmetic.
"""

import argparse
import json
import pathlib
import sys

Widths = tuple[int, int, int]  # query heads, KV heads, MLP channels


def arithmetic(widths: Widths, head_dim: int) -> int:
  """Weights of a layer's projections per hidden channel, to which its arithmetic is proportional."""
  heads, kv_heads, channels = widths
  return 2 * (heads + kv_heads) * head_dim + 3 * channels


def padding(layers: list[Widths], head_dim: int) -> list[float]:
  """The least extra arithmetic, as a share, with 1, 2, … runs of layers."""
  count = len(layers)

  def padded(start: int, stop: int) -> int:
    widest = tuple(map(max, zip(*layers[start:stop], strict=True)))
    return (stop - start) * arithmetic(widest, head_dim)

  # least[stop]: of the first `stop` layers in the present number of runs.
  least: list[float] = [0.0] + [float('inf')] * count
  found = []
  for _ in range(count):
    least = [float('inf')] + [
      min(least[start] + padded(start, stop) for start in range(stop)) for stop in range(1, count + 1)
    ]
    found.append(least[-1])
  return [total / found[-1] - 1 for total in found]


def main(arguments: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('runs', nargs='+', type=pathlib.Path)
  parser.add_argument('--head_dim', type=int, required=True)
  options = parser.parse_args(arguments)
  shares = (1, 3 / 4, 2 / 3, 1 / 2, 1 / 3, 1 / 4)
  print('| run | ' + ' | '.join(f'{share:.0%} of the layers' for share in shares) + ' |')
  print('|---|' + '---|' * len(shares))
  for directory in options.runs:
    stage = json.loads((directory / 'report.json').read_text())['stages'][-1]
    every = zip(stage['num_heads'], stage['num_kv_heads'], stage['ffn'], strict=True)
    layers = [widths for widths in every if any(widths)]  # the others were removed
    extra = padding(layers, options.head_dim)
    cells = [f'{extra[max(round(share * len(layers)), 1) - 1]:.1%}' for share in shares]
    print(f'| {directory.name} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
  main(sys.argv[1:])
