"""CPU time and peak memory of pruning by the paper's method, compared with PyTorch.

    python -m benchmarks.pruning [--steps=15] [--rounds=1] [--write]

SmolLM2-135M-Instruct is pruned to 110.6 million parameters in 15 steps, with Taylor scores on 128 x 64
calibration tokens. Ours is the whole program from the stored weights to the export, with compilation and an
empty program cache, without PyTorch as in a default installation; in fp32 and in bfloat16. The peer is
written as by a PyTorch user: the transformers model, autograd, one forward pass with hooks and one backward;
it loads, prunes and saves. Whole processes are measured; half an hour on two cores.
"""

import json
import pathlib
import shutil
import statistics
import sys

from benchmarks import demo_models, side_by_side
from benchmarks.side_by_side import Run, ratio, spread

TOKENS = 128 * 64
# Parameters before, and those left by the authors' program after 15 steps.
DENSE, LEFT = 134_515_008, 110_602_944
# So that a few more channels, by another dtype's scores, do not need another step.
SLACK = 10_000
# The authors' program for the same 15 steps, one thread of another machine (its log): CPU seconds, GB.
AUTHORS = 902, 8.06


def ours(workdir: pathlib.Path, dtype: str, steps: int) -> list[str]:
  """The command of our program, to the size that the paper's schedule leaves after `steps` steps."""
  target = DENSE - round(steps * (DENSE - LEFT) / 15) + SLACK
  fields = {
    'model.source': demo_models.GGUF,
    'model.dtype': dtype,
    'prune.target': target,
    'prune.calibration.source': 'data/sotu/train',
    'prune.calibration.samples': 128,
    'prune.calibration.length': 64,
    'prune.calibration.batch': 16,
    'evaluate.health': False,  # which the peer does not measure
    'export.dtype': 'float32',
  }
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  program = [sys.executable, 'benchmarks/programs/main_without_torch.py', '--config=configs/adapt.py']
  return [*program, '--mode=prune', f'--workdir={workdir}', *flags]


def check_steps(workdir: pathlib.Path, steps: int) -> None:
  """Raises SystemExit unless our program has taken as many steps as the peer."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  if (taken := max(line['step'] for line in lines if 'layer_importance' in line)) != steps:
    raise SystemExit(f'ours took {taken} steps, PyTorch {steps}')


def check_sizes(parameters: dict[str, int]) -> None:
  """Raises SystemExit unless the programs left models of the same size: else their work differed."""
  if max(parameters.values()) > 1.001 * min(parameters.values()):
    raise SystemExit(f'the programs left models of different sizes: {parameters}')


def table(runs: dict[str, list[Run]]) -> str:
  peer = runs['torch float32']
  titles = '| program | CPU s | ratio | wall s | ratio | peak GB | ratio | parameters |'
  lines = [titles, '|---' * 8 + '|']
  for name, found in runs.items():
    cells = []
    for get in (lambda r: r.cpu_seconds, lambda r: r.seconds, lambda r: r.peak_bytes / 1e9):
      mine, theirs = [get(r) for r in found], [get(r) for r in peer]
      cells += [spread(mine), ratio(mine, theirs) if found is not peer else '1']
    lines.append(f'| {name} | {" | ".join(cells)} | {found[0].answer["parameters"]:,} |')
  return '\n'.join(lines)


def main() -> None:
  parser = side_by_side.parser(__doc__, rounds=1)
  parser.add_argument('--steps', type=int, default=15)
  args = parser.parse_args()
  dense, out = demo_models.dense(), demo_models.OUT / 'pruning'
  limits = side_by_side.run([sys.executable, 'benchmarks/programs/limits.py']).answer
  runs: dict[str, list[Run]] = {'ours float32': [], 'torch float32': [], 'ours bfloat16': []}
  for _ in range(args.rounds):
    shutil.rmtree(out, ignore_errors=True)
    commands = {
      'ours float32': ours(out / 'float32', 'float32', args.steps),
      'torch float32': [
        sys.executable, 'benchmarks/programs/prune_torch.py', str(dense), str(args.steps), str(out / 'torch')
      ],
      'ours bfloat16': ours(out / 'bfloat16', 'bfloat16', args.steps),
    }  # fmt: skip
    for name, found in side_by_side.in_turn(commands, 1).items():
      workdir = out / name.split()[1]
      if name.startswith('ours'):
        check_steps(workdir, args.steps)
        found[0].answer['parameters'] = demo_models.parameters(workdir / 'hf')
      runs[name] += found
    check_sizes({name: found[-1].answer['parameters'] for name, found in runs.items()})
  shutil.rmtree(out, ignore_errors=True)
  flops = args.steps * TOKENS * scoring_flops(dense)
  floors = ', '.join(f'{flops / limits[d] / 1e9:,.0f} s in {d}' for d in ('float32', 'bfloat16'))
  cpu = statistics.median(r.cpu_seconds for r in runs['ours float32'])
  memory = statistics.median(r.peak_bytes for r in runs['ours float32']) / 1e9
  text = (
    f'{args.steps} steps of 128 x 64 tokens, median (range) of {args.rounds} rounds; ratios to PyTorch in '
    f'fp32. Limits: {flops / 1e12:,.0f} TFLOP (layers forward twice and backward, so that not more than one '
    "layer's gradient is held; the head without its weight's gradient), "
    f'{floors} on all cores; the weights are {4 * demo_models.parameters(dense) / 1e9:.2f} GB, held once '
    f'while scoring.\n\n{table(runs)}\n\n'
    f"The authors' program took {AUTHORS[0] / 15:.0f} CPU seconds a step (one thread, another machine, Xeon "
    f'with AMX) and {AUTHORS[1]} GB: ours {cpu / args.steps / (AUTHORS[0] / 15):.2f} of its time, across '
    f'machines, and {memory / AUTHORS[1]:.2f} of its memory.'
  )
  side_by_side.report('Pruning', text, args.write)


def scoring_flops(directory: pathlib.Path) -> float:
  """FLOPs per token of scoring: layers forward twice and backward, the head forward and half backward."""
  head = 2.0 * demo_models.head_weights(directory)
  return 4 * (demo_models.forward_flops(directory, 64) - head) + 2 * head


if __name__ == '__main__':
  main()
