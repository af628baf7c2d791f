"""Tokens/s and memory of the recovery step after pruning to 80 %, compared with PyTorch.

    python -m benchmarks.training [--rounds=2] [--recovery] [--write]

SmolLM2-135M-Instruct pruned by the demo's method, batch 4 x 256, AdamW, clipped gradients; fp32, and bfloat16
products with fp32 weights (PyTorch: autocast). The peer is the export of the same model in transformers, with
autograd, torch's fused AdamW and, in separate rows, torch.compile. Each run is a new process; peak memory is
that of the process, including compilation. Ours also runs with `train.remat` and `train.moments_dtype`.
A quarter of an hour on two cores, without making the models. With --recovery, only our step with the
teacher, 4 x 512, in each dtype and with memory kept: five minutes.
"""

import argparse
import pathlib
import statistics
import sys

from benchmarks import demo_models, side_by_side
from benchmarks.side_by_side import Run, ratio, spread

HERE = pathlib.Path(__file__).parent / 'programs'
# Variants of ours and of the peer to compare.
PAIRS = (
  ('float32', 'float32'),
  ('float32', 'float32-compile'),
  ('bfloat16', 'bfloat16'),
  ('bfloat16', 'bfloat16-compile'),
  ('float32-remat', 'float32'),
  ('bfloat16-moments', 'bfloat16'),
)

RECOVERY = (
  'float32', 'bfloat16', 'float32-kept', 'bfloat16-kept', 'bfloat16-kept-cache', 'bfloat16-kept-micro2',
  'bfloat16-kept-micro1',
)  # fmt: skip


def recovery_table(runs: dict[str, list[Run]]) -> str:
  """One row per variant of ours; each value is a step's."""
  lines = ['| ours | tokens/s | CPU seconds of a step | peak GB |', '|---' * 4 + '|']
  for form, of in runs.items():
    rates, seconds = ([x for run in of for x in run.answer[n]] for n in ('tokens_per_second', 'cpu_seconds'))
    memory = spread([run.peak_bytes / 1e9 for run in of])
    lines.append(f'| {form} | {spread(rates, 0)} | {spread(seconds)} | {memory} |')
  return '\n'.join(lines)


def recovery(model: pathlib.Path, args: argparse.Namespace) -> None:
  """Writes the section of our step with a teacher, without a peer."""
  program, dense = [sys.executable, str(HERE / 'train_ours.py'), str(model)], str(demo_models.dense())
  commands = {form: [*program, form, str(args.steps), dense] for form in RECOVERY}
  runs = side_by_side.in_turn(commands, args.rounds)
  text = (
    f'{demo_models.parameters(model):,} parameters, 4 x 512 tokens a step, KL divergence from the dense '
    'model, which runs beside or told its 64 likeliest ids before (`-cache`, `train.distill.cache`); '
    f'rounds: {args.rounds}, median (range) of {args.steps} steps in each. `-kept`: memory is kept '
    'from step to step, as the command does. `-micro2`: `train.micro_batch`, else 4.\n\n'
  )
  side_by_side.report('Recovery', text + recovery_table(runs), args.write)


def table(runs: dict[str, list[Run]], limits: dict[str, float], flops: float) -> str:
  """One row per pair; ratios are to the peer's run of the same round."""

  def rates(name: str) -> list[float]:
    return [statistics.median(run.answer['tokens_per_second']) for run in runs[name]]

  def steps(name: str) -> list[float]:
    return [rate for run in runs[name] for rate in run.answer['tokens_per_second']]

  def memory(name: str) -> list[float]:
    return [run.peak_bytes / 1e9 for run in runs[name]]

  titles = (
    'ours', 'PyTorch', 'tokens/s ours', 'PyTorch', 'ratio', 'ours of the arithmetic limit', 'peak GB ours',
    'PyTorch', 'ratio', 'compile s ours', 'PyTorch, with first step',
  )  # fmt: skip
  lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
  for own, peer in PAIRS:
    a, b = f'ours {own}', f'torch {peer}'
    limit = limits[own.split('-')[0]] * 1e9 / flops
    compiled = [spread([r.answer['compile_seconds'] for r in runs[name]], 1) for name in (a, b)]
    cells = [own, peer, spread(steps(a), 0), spread(steps(b), 0), ratio(rates(a), rates(b))]
    cells.append(f'{statistics.median(rates(a)) / limit:.0%} of {limit:,.0f}')
    cells += [spread(memory(a)), spread(memory(b)), ratio(memory(a), memory(b)), *compiled]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def main() -> None:
  parser = side_by_side.parser(__doc__, rounds=2)
  parser.add_argument(
    '--model', type=pathlib.Path, help='the pruned export (default: made as the demo does it)'
  )
  parser.add_argument('--recovery', action='store_true', help='only our step with a teacher')
  parser.add_argument('--steps', type=int, default=5, help='timed in each process, after one more')
  args = parser.parse_args()
  model = args.model or demo_models.pruned()
  if args.recovery:
    recovery(model, args)
    return
  limits = side_by_side.run([sys.executable, str(HERE / 'limits.py')]).answer
  commands = {}
  for own, peer in PAIRS:
    for name, form, program in (('ours', own, 'train_ours.py'), ('torch', peer, 'train_torch.py')):
      commands[f'{name} {form}'] = [sys.executable, str(HERE / program), str(model), form, str(args.steps)]
  runs = side_by_side.in_turn(commands, args.rounds)
  weights, flops = demo_models.parameters(model), 3 * demo_models.forward_flops(model, 256)
  moved, speed = 28 * weights / 1e9, limits['gigabytes_per_second']
  text = (
    f'{weights:,} parameters, 4 x 256 tokens a step; rounds: {args.rounds}, median (range) of {args.steps} '
    'steps in each. Limits: '
    f'{flops / 1e6:,.0f} MFLOP a token (forward and twice that backward, attention included) at '
    f'{limits["float32"]:,.0f} GFLOP/s in fp32 and {limits["bfloat16"]:,.0f} in bfloat16, which one product '
    f'of 1,024 x 1,024 reaches here; bytes: the optimizer reads and writes {moved:.1f} GB a step in fp32, '
    f'{moved / speed:.2f} s at {speed:.0f} GB/s. Weights, gradients and two moments in fp32 are '
    f'{16 * weights / 1e9:.2f} GB. `-remat` computes whole layers again (`train.remat`), `-moments` keeps '
    'both moments in bfloat16 (`train.moments_dtype`).\n\n' + table(runs, limits, flops)
  )
  side_by_side.report('Training step', text, args.write)


if __name__ == '__main__':
  main()
