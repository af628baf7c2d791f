"""Tokens/s of evaluation and generation, dense and pruned, compared with transformers in PyTorch.

    python -m benchmarks.inference [--dense=DIRECTORY] [--pruned=DIRECTORY] [--rounds=1]
                                   [--dtypes=float32,bfloat16] [--peers=eager,compiled] [--write]

It measures perplexity over windows of 1,024 tokens, prefill of prompts of 128 tokens, and greedy decoding of
64 more, with one row and eight. The models are those of `benchmarks/demo_models.py`, unless given. The peer
is the exported directory in transformers, eager and with torch.compile, with the faster KV cache; rates
exclude compiling and first calls. The limit of evaluation and prefill is their FLOPs at the speed of one big
product; that of decoding is the bytes of weights and cache at the speed of reading memory, or its FLOPs if
they take longer. `programs/limits.py` measures these speeds. About
four minutes per round, dtype and model on two cores, half of it torch.compile.
"""

import json
import statistics
import sys
from typing import Any

from benchmarks import demo_models
from benchmarks.side_by_side import Run, in_turn, parser, ratio, report, run, spread

SETTINGS: dict[str, Any] = {
  'windows': 4, 'window': 1024, 'batch': 4,
  'prompt': 128, 'new': 64, 'rows': [1, 8],
  'repeats': 3,
}  # fmt: skip
TITLE = 'Evaluation and generation'


def commands(path: str, dtype: str, peers: list[str], settings: dict[str, Any]) -> dict[str, list[str]]:
  """Commands of ours and each peer, by name."""
  found = {}
  for name in ('ours', *peers):
    s = json.dumps(settings | {'dtype': dtype, 'compile': name == 'compiled'})
    program = 'ours' if name == 'ours' else 'torch'
    found[name] = [sys.executable, '-m', f'benchmarks.programs.inference_{program}', path, s]
  return found


def figures(rows: list[int]) -> dict[str, str]:
  """Figure of a program's answer -> what it is."""
  found = {'evaluation': 'evaluation'}
  for count in rows:
    found |= {f'prefill_{count}': f'prefill, batch {count}', f'decode_{count}': f'decode, batch {count}'}
  return found


def limit(gflops: float, read: float, cost: dict[str, Any], figure: str) -> float:
  """The most tokens/s that arithmetic (GFLOP/s) or memory (GB/s read) allow."""
  found = 1e9 * gflops / cost[f'{figure}_flops']
  if f'{figure}_bytes' in cost:
    found = min(found, 1e9 * read / cost[f'{figure}_bytes'] * int(figure.split('_')[1]))
  return found


def table(
  model: str, dtype: str, runs: dict[str, list[Run]], rows: list[int], limits: dict[str, float]
) -> str:
  """Rows of the report for one model and dtype; the peer of a figure is the one with the highest median."""
  answers = {name: [r.answer for r in done] for name, done in runs.items()}
  losses = {name: found[0]['loss'] for name, found in answers.items()}
  if max(losses.values()) - min(losses.values()) > (1e-3 if dtype == 'float32' else 3e-2):
    raise SystemExit(f'{model} {dtype}: the programs do not compute the same loss: {losses}')
  lines = []
  for figure, title in figures(rows).items():
    rates = {name: [a[figure] for a in found] for name, found in answers.items()}
    ours = rates.pop('ours')
    peer = max(rates, key=lambda name: statistics.median(rates[name]))
    most = limit(limits[dtype], limits['gigabytes_read_per_second'], answers['ours'][0], figure)
    lines.append(
      f'| {model} | {dtype} | {title} | {spread(ours, 1)} | {spread(rates[peer], 1)}, {peer} '
      f'| {ratio(ours, rates[peer])} | {most:,.0f} | {statistics.median(ours) / most:.2f} |'
    )
  return '\n'.join(lines)


def compiled(model: str, dtype: str, runs: dict[str, list[Run]]) -> str:
  """A table row: compile seconds and peak memory of each program."""
  cells = []
  for done in runs.values():
    seconds = [sum(v for k, v in r.answer.items() if k.endswith('_compile')) for r in done]
    cells.append(f'{spread(seconds, 0)} s, {max(r.peak_bytes for r in done) / 1e9:.2f} GB')
  return f'| {model} | {dtype} | {" | ".join(cells)} |'


def measure(
  models: dict[str, str], dtypes: list[str], peers: list[str], rounds: int, settings: dict[str, Any]
) -> str:
  """The section's text."""
  titles = (
    'model | dtype | what | ours, tokens/s | PyTorch, tokens/s | ratio | limit, tokens/s | ours / limit'
  )
  speeds = [f'| {titles} |', '|---' * 8 + '|']
  others = [f'| model | dtype | {" | ".join(("ours", *peers))} |', '|---|---|---|' + '---|' * len(peers)]
  limits = run([sys.executable, 'benchmarks/programs/limits.py']).answer
  for dtype in dtypes:
    for model, path in models.items():
      runs = in_turn(commands(path, dtype, peers, settings), rounds)
      speeds.append(table(model, dtype, runs, settings['rows'], limits))
      others.append(compiled(model, dtype, runs))
  s, peaks = settings, ', '.join(f'{value:,.0f} {what}' for what, value in limits.items())
  title = (
    f'{s["windows"]} windows of {s["window"]:,} tokens, at most {s["batch"]} at once; prompts of '
    f'{s["prompt"]} random ids, {s["new"]} new tokens, greedy. Median (lowest–highest) of {rounds} rounds in '
    f'turn, of each run the median of {s["repeats"]}. Limits from {peaks}.'
  )
  beside = 'Seconds compiled (of PyTorch: the first calls above later ones) and peak memory:'
  return '\n'.join([title, '', *speeds, '', beside, '', *others])


def main() -> None:
  made = parser(__doc__, rounds=1)
  made.add_argument('--dense', help='an export (default: SmolLM2-135M-Instruct)')
  made.add_argument('--pruned', help='an export (default: made as the demo does it)')
  made.add_argument('--dtypes', default='float32,bfloat16')
  made.add_argument('--peers', default='eager,compiled')
  args = made.parse_args()
  models = {
    'dense': args.dense or str(demo_models.dense()),
    'pruned': args.pruned or str(demo_models.pruned()),
  }
  text = measure(models, args.dtypes.split(','), args.peers.split(','), args.rounds, SETTINGS)
  report(TITLE, text, args.write)


if __name__ == '__main__':
  main()
