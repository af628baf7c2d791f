"""On one GPU: the whole pipeline beside a CPU, recovery, pruning, scoring compared with PyTorch, generation,
cuDNN's attention and checkpoints.

    python -m benchmarks.gpu [--minutes=8] [--toy] [--write]

Without a network, install from a folder of wheels that another machine of the same kind has filled:

    pip wheel -w wheels '.[cuda]'                                 # there; cuda13 for a driver of CUDA 13
    pip install --no-index --find-links=wheels 'adapt-jax[cuda]'  # here, in a copy of the repository

Random weights are made on the device, for SmolLM2-135M, Llama-3.2-1B and -3B, and two and eight of the 32
layers of Llama-3.1-8B; the pipeline takes the real weights of SmolLM2-135M, where `make fetch` has left them.
Each row runs in a separate process, alone on the card, one after another (attention
rows share one); a row that fails has the reason in the table. The most important rows come first; a row for
which the minutes do not suffice is left out and marked. The tables are printed at the end; with --write, the
tables so far are also written to benchmarks/RESULTS.md after each row.

The peer of scoring is a transformers model in bf16 on CUDA: autograd, hooks for the cosine distances, Taylor
scores; it needs a PyTorch that supports the card. --toy runs the same on the CPU with tiny models, in
seconds: its figures are meaningless.
"""

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import side_by_side

TITLE = 'On one GPU'
# TFLOP/s of dense bf16 products in NVIDIA's data sheets; the first key in the card's name is used.
NOMINAL = {
  'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'H200': 989, 'GH200': 989, 'B200': 2250, 'A100': 312,
  'L40S': 362, 'RTX 4090': 165,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of the tables: `rows` x `length` tokens at once.

  micro: rows of a micro-batch, 0 for all. seconds: with fewer left it is not started. heads: N, K and H.
  teacher: whether training is recovery, with the dense model beside. form: a key of `FORMS`, or what else is
  different.
  """

  kind: str
  seconds: int
  model: str = ''
  rows: int = 0
  length: int = 0
  micro: int = 0
  remat: bool = False
  new: int = 0
  heads: tuple[int, int, int] = (0, 0, 0)
  segmented: bool = False
  window: int = 0
  teacher: bool = False
  form: str = ''

  @property
  def name(self) -> str:
    heads = '{}/{} heads of {}'.format(*self.heads) + ', segments' * self.segmented
    heads += f', window of {self.window}' * bool(self.window)
    what = heads if self.kind == 'attention' else self.model + ' with teacher' * self.teacher
    parts = [self.kind, what, f'{self.rows} x {self.length}' * bool(self.rows), self.form]
    return ' '.join(part for part in parts if part)


# What the process of such a row has in its environment.
FORMS = {
  'on the CPU': {'JAX_PLATFORMS': 'cpu'},
  'without autotuning': {'XLA_FLAGS': '--xla_gpu_autotune_level=0'},
  'without Triton': {'XLA_FLAGS': '--xla_gpu_enable_triton_gemm=false'},
}


def _attention(rows: int, length: int, *heads: int, segmented: bool = False, window: int = 0) -> Row:
  form: Any = {'heads': heads, 'segmented': segmented, 'window': window}
  return Row('attention', 15, rows=rows, length=length, **form)


ROWS = (
  Row('card', 20),
  Row('pipeline', 60, '135M', 16, 256),
  Row('pipeline', 60, '135M', 16, 256, form='on the CPU'),
  Row('pipeline', 40, '135M', 16, 256, form='in float32'),
  Row('training', 50, '135M', 64, 1024, micro=16, teacher=True),
  Row('training', 60, '1B', 32, 1024, micro=16, teacher=True),
  Row('curvature', 60, '8B, 2 of 32 layers', 32, 1024, micro=4),
  Row('least squares', 60, '8B, 2 of 32 layers', 32, 1024, micro=4),
  Row('training', 45, '1B, 4 different layers', 32, 1024, micro=16),
  Row('training', 45, '1B, 4 different layers', 32, 1024, micro=16, form='without autotuning'),
  Row('training', 45, '1B, 4 different layers', 32, 1024, micro=16, form='without Triton'),
  Row('checkpoint', 30, '135M'),
  _attention(8, 2048, 32, 8, 64),
  _attention(8, 2048, 32, 8, 64, segmented=True),
  _attention(8, 2048, 32, 8, 64, segmented=True, window=512),
  _attention(8, 2048, 4, 1, 256, window=512),
  _attention(8, 1024, 9, 3, 64, segmented=True),
  _attention(8, 1024, 5, 1, 64, segmented=True),
  _attention(8, 1024, 1, 1, 64),
  _attention(2, 4096, 32, 8, 128),
  _attention(2, 4096, 32, 8, 128, segmented=True),
  Row('training', 60, '1B', 16, 2048, micro=8),
  Row('scoring', 40, '135M', 128, 64),
  Row('scoring by PyTorch', 30, '135M', 128, 64),
  Row('generation', 40, '1B', 1, 512, new=128),
  Row('training', 50, '135M', 64, 1024, micro=32),
  Row('training', 60, '1B', 8, 4096, micro=4),
  Row('training', 70, '3B', 8, 1024, micro=4, teacher=True),
  Row('training', 60, '8B, 8 of 32 layers', 4, 2048),
  Row('scoring', 40, '1B', 512, 64, micro=128),
  Row('scoring by PyTorch', 40, '1B', 512, 64, micro=128),
  Row('training', 70, '3B', 4, 2048),
  Row('generation', 40, '1B', 32, 512, new=128),
  Row('training', 60, '1B', 32, 1024, micro=16),
)
TOY = (
  Row('card', 0),
  Row('pipeline', 0, 'toy', 4, 32),
  Row('pipeline', 0, 'toy', 4, 32, form='on the CPU'),
  Row('pipeline', 0, 'toy', 4, 32, form='in float32'),
  Row('checkpoint', 0, 'toy'),
  _attention(2, 32, 9, 3, 8, segmented=True, window=9),
  Row('training', 0, 'toy', 4, 32, micro=2),
  Row('training', 0, 'toy', 4, 32, micro=2, teacher=True),
  Row('curvature', 0, 'toy', 4, 32, micro=2),
  Row('least squares', 0, 'toy', 4, 32, micro=2),
  Row('scoring', 0, 'toy', 4, 16, micro=2),
  Row('scoring by PyTorch', 0, 'toy', 4, 16, micro=2),
  Row('generation', 0, 'toy', 2, 16, new=4),
)


def children(rows: tuple[Row, ...], toy: bool) -> list[list[int]]:
  """Groups of rows that share a process: attention rows, which are short; all toy rows, to import once."""
  shared = [toy or row.kind == 'attention' or i for i, row in enumerate(rows)]
  return [list(group) for _, group in itertools.groupby(range(len(rows)), key=shared.__getitem__)]


def measured(command: list[str], seconds: float, form: str = '') -> Iterator[dict[str, Any]]:
  """Yields the objects that a program prints; then {'ended': why} if it failed or was cut off.

  form: of `Row`.
  """
  # No cache, since compiling is measured; 0.92 of the memory, as in launch/.
  env = {'CUDA_VISIBLE_DEVICES': '0'} | os.environ | side_by_side.ENVIRONMENT
  if 'XLA_PYTHON_CLIENT_MEM_FRACTION' not in env:
    env.setdefault('XLA_CLIENT_MEM_FRACTION', '0.92')
  for name, value in FORMS.get(form, {}).items():
    env[name] = f'{env.get(name, "")} {value}'.strip() if name == 'XLA_FLAGS' else value
  with tempfile.TemporaryFile() as errors:
    process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=side_by_side.ROOT
    )
    late = threading.Event()
    timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
    timer.start()
    assert process.stdout
    for line in process.stdout:
      if line.startswith('{'):
        yield json.loads(line)
    code = process.wait()
    timer.cancel()
    errors.seek(0)
    last = errors.read().decode(errors='replace').strip().splitlines()[-1:]
  if late.is_set():
    yield {'ended': f'left out: cut off after {seconds:.0f} s'}
  elif code:
    yield {'ended': f'failed: code {code}: {"".join(last)[:300]}'}


# -- tables -------------------------------------------------------------------------------------------------

_END = ' | peak GB | compiled, s'
_LIMIT = 's | limit, s | planned GB'
HEADS = {
  'pipeline': 'model | rows | groups removed | of them on the CPU too | perplexity, dense | over the CPU | '
  'pruned | over the CPU | healed | s | s, with healing | peak GB',
  'attention': 'rows | heads | form | ms plain | ms | plain / it | TFLOP/s | GB beside, plain | GB | '
  'off from fp32, plain: output, dq, dk, dv | off',
  'training': f'model | rows | micro-batch | GFLOP a token | tokens/s | {_LIMIT} | TFLOP/s | '
  f'of nominal (MFU) | of one product{_END} | loss, first and last',
  'curvature': f'model | rows | {_LIMIT}{_END}',
  'least squares': f'model | rows | {_LIMIT}{_END}',
  'scoring': f'model | rows | program | s a step | tokens/s | TFLOP/s | PyTorch / ours{_END}',
  'generation': f'model | rows | prefill tokens/s | of one product | decode tokens/s | limit | of it{_END}',
  'checkpoint': 'model | GB | s that training waits | s to save | s to restore',
}
NOTES = {
  'pipeline': 'Real weights, 80 % of the parameters, curvature and least squares, in bfloat16 (on the CPU '
  'float32); perplexity on as many rows of a text held out. The CPU is the same machine. Seconds are those '
  'of pruning, compiling included.',
  'attention': 'Causal, forward and backward; FLOP: 3 x 2·B·T²·N·H. Errors: the largest of the first row, '
  'over the largest value. Segments: four documents a row.',
  'training': 'The step of mode accel: bf16 products, fp32 weights, gradients, Adam; four documents a row. '
  'FLOP a token: 3 x (2 a weight of every product + 2·T·N·H of attention a layer), and once more of the '
  'teacher, without what remat does again. Limit: of the kernels one after another, at the published peaks '
  '(mode estimate; 0: not a card that it knows). Planned: by the compiler, beside the peak as it was. '
  'Different layers are those of a pruned stage: what their row took to compile, less that without '
  'autotuning, is what a stage spends on choosing kernels for so many layers.',
  'curvature': 'Scores of the default method, with second moments, Cholesky factors and solves in float32.',
  'least squares': 'Weights that make up for what is removed, as the default method ends.',
  'scoring': 'Taylor scores of all groups and cosine distances of all layers, to the host, bf16. FLOP a '
  'token as in training, though ours goes forward twice.',
  'checkpoint': 'Weights and Adam moments, by the checkpoints of a run, with checksums.',
  'generation': 'Greedy, bf16. The limit of decoding: weights and cache, read once a token.',
}


def spread(values: list[float], digits: int = 0) -> str:
  return side_by_side.spread(values, digits)


def nominal(card: dict[str, Any]) -> int:
  return next((rate for name, rate in NOMINAL.items() if name in card['device']), 0)


def cells(i: int, rows: tuple[Row, ...], found: dict[int, dict[str, Any]]) -> list[str]:
  """Table cells of a measured row."""
  row, r, card = rows[i], found[i], found[0]
  peak, compiled = f'{r.get("peak", 0) / 1e9:.1f}', f'{r.get("compile", 0):.0f}'
  size = f'{row.rows} x {row.length}'
  if row.kind == 'attention':
    plain, other = (statistics.median(r[name]) for name in ('plain', 'other'))
    errors = [' '.join(f'{e:.1e}' for e in r[f'{name} errors']) for name in ('plain', 'other')]
    held = [f'{r[f"{name} bytes"] / 1e9:.2f}' for name in ('plain', 'other')]
    times = [f'{x:.2f}' for x in (1e3 * plain, 1e3 * other, plain / other, r['flops'] / other / 1e12)]
    return [size, row.name.split(' ', 1)[1].removesuffix(f' {size}'), r['form'], *times, *held, *errors]
  if row.kind == 'generation':
    limit = row.rows * 1e9 * card['bandwidth'] / r['bytes']
    of_product = statistics.median(r['prefill']) * r['flops'] / (1e12 * card['product'])
    decode = [spread(r['decode']), f'{limit:,.0f}', f'{statistics.median(r["decode"]) / limit:.0%}']
    prefill = [f'{size} + {row.new}', spread(r['prefill']), f'{of_product:.0%}']
    return [row.model, *prefill, *decode, peak, compiled]
  if row.kind == 'checkpoint':
    times = (spread(r[name], 1) for name in ('blocked', 'save', 'restore'))
    return [row.model, f'{r["bytes"] / 1e9:.1f}', *times]
  if row.kind == 'pipeline':
    return [f'{row.model} {row.form}'.strip(), size, *_beside_cpu(i, rows, found), peak]
  held = f'{r.get("planned", 0) / 1e9:.1f}'
  planned = [spread(r['seconds'], 3), f'{r.get("limit", 0):.3f}', held]
  if row.kind in ('curvature', 'least squares'):
    return [row.model, size, *planned, peak, compiled]
  rates = [r['tokens'] / s for s in r['seconds']]
  if row.kind == 'scoring by PyTorch':
    ratios = [
      statistics.median(r['seconds']) / statistics.median(found[j]['seconds'])
      for j, other in enumerate(rows)
      if other == dataclasses.replace(row, kind='scoring', seconds=other.seconds)
      and 'seconds' in found.get(j, {})
    ]
    ratio = ''.join(f'{x:.2f}' for x in ratios) or '—'
    name = f'PyTorch {r["torch"]}'
    return [row.model, size, name, spread(r['seconds'], 3), spread(rates), '—', ratio, peak, 'eager']
  speed = statistics.median(rates) * r['flops'] / 1e12
  if row.kind == 'scoring':
    figures = [spread(r['seconds'], 3), spread(rates), f'{speed:.1f}', '']
    return [row.model, size, 'ours', *figures, peak, compiled]
  micro = f'{r["micro"]}{", remat" * r["remat"]}' + ''.join(f'; out of memory: {x}' for x in r['before'])
  mfu = f'{speed / nominal(card):.1%}' if nominal(card) else '—'
  limits = [*planned, f'{speed:.1f}', mfu, f'{speed / card["product"]:.1%}']
  losses = ' '.join(f'{x:.3f}' for x in r['losses'])
  name = f'{row.model}{" with teacher" * row.teacher} {row.form}'.strip()
  return [name, size, micro, f'{r["flops"] / 1e9:.2f}', spread(rates), *limits, peak, compiled, losses]


def _beside_cpu(i: int, rows: tuple[Row, ...], found: dict[int, dict[str, Any]]) -> list[str]:
  """Cells of a pipeline: what it removed, perplexities and seconds; shares of what the CPU's row has."""
  r, removed = found[i], int(found[i]['removed'], 16)
  on_cpu = (found.get(j, {}) for j, row in enumerate(rows) if row.form == 'on the CPU')
  cpu = next((x for x in on_cpu if 'removed' in x), None)
  same = (removed & int(cpu['removed'], 16)).bit_count() / removed.bit_count() if cpu else 0.0
  made = [f'{removed.bit_count():,}', f'{same:.2%}' if cpu else '—']
  for name in ('dense', 'pruned'):
    made += [f'{r[name]:.3f}', f'{r[name] / cpu[name]:.4f}' if cpu else '—']
  made.append(f'{r["healed"]:.3f}' if 'healed' in r else '—')
  healing = f'{r["healing seconds"]:.1f}' if 'healing seconds' in r else '—'
  return [*made, spread(r['seconds'], 1), healing]


def slowest(rows: tuple[Row, ...], found: dict[int, dict[str, Any]]) -> list[str]:
  """A line for each step that was traced."""
  traced = ((rows[i], r['kernels']) for i, r in found.items() if 'kernels' in r)
  return [
    f'\nSlowest kernels of {row.name}, ms: ' + ', '.join(f'{name} {ms:.2f}' for name, ms in kernels) + '.'
    for row, kernels in traced
  ]


def table(kind: str, rows: tuple[Row, ...], found: dict[int, dict[str, Any]]) -> list[str]:
  heads = HEADS[kind].split(' | ')
  lines = ['', f'### {kind.capitalize()}', '', NOTES[kind], '']
  lines += [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
  for i, row in enumerate(rows):
    if row.kind.startswith(kind):
      said = found.get(i, {'said': 'not yet'}).get('said')
      values = [row.name, said] + ['—'] * (len(heads) - 2) if said else cells(i, rows, found)
      lines.append(f'| {" | ".join(values)} |')
  return lines


def text(rows: tuple[Row, ...], found: dict[int, dict[str, Any]]) -> str:
  card = found[0]
  names = ', '.join(x for x in (card['device'], card['platform']) if x)
  first = (
    f'{names}: {nominal(card):,} TFLOP/s nominal (0: not known), {card["product"]:,.1f} TFLOP/s in one large '
    f'bf16 product, {card["bandwidth"]:,.0f} GB/s reading and writing. Median (lowest–highest). Peak memory '
    'as the device counts it, 0 where it does not.'
  )
  tables = (line for kind in HEADS for line in table(kind, rows, found))
  return '\n'.join([first, *tables, *slowest(rows, found)])


def run(rows: tuple[Row, ...], toy: bool, minutes: float, write: bool) -> dict[int, dict[str, Any]]:
  """By index of the row, its figures, or {'said': why there are none}."""
  until = time.time() + 60 * minutes - 5
  found: dict[int, dict[str, Any]] = {}
  for group in children(rows, toy):
    left = until - time.time()
    command = [sys.executable, '-m', 'benchmarks.programs.gpu_rows', f'--until={until}']
    command += [f'--rows={",".join(map(str, group))}'] + ['--toy'] * toy
    enough = left >= rows[group[0]].seconds
    form, late = '' if toy else rows[group[0]].form, {'ended': f'left out: {left:.0f} s were left'}
    for answer in measured(command, left, form) if enough else [late]:
      ended = {i: {'said': answer['ended']} for i in group if i not in found} if 'ended' in answer else {}
      new = ended or {answer['row']: answer}
      for i, row in new.items():
        print(f'{until - time.time():.0f} s left: {rows[i].name}: {json.dumps(row)[:300]}', file=sys.stderr)
      found |= new
      if 'device' not in found[0]:
        raise SystemExit(f'no figures without the card: {found[0]["said"]}')
      side_by_side.report(TITLE, text(rows, found), write, quiet=True)
  return found


def main() -> None:
  parser = side_by_side.parser(__doc__)
  parser.add_argument('--minutes', type=float, default=8.0, help='in which all of it must be done')
  parser.add_argument('--toy', action='store_true', help='tiny models on the CPU: only that it runs')
  args = parser.parse_args()
  rows = TOY if args.toy else ROWS
  side_by_side.report(TITLE, text(rows, run(rows, args.toy, args.minutes, args.write)), args.write)


if __name__ == '__main__':
  main()
