"""Compile time of a stage by layers and distinct widths, with a cold and a warm program cache.

    python -m benchmarks.compile_time [--rounds=1] [--write] [--peer=4]

It compiles from shapes alone, without weights. Each case is a new process with an empty cache directory
(cold), then another process with the filled one (warm). --peer=LAYERS: torch.compile of this many layers of
SmolLM2-135M, all different, in turn with ours; 0: none. About seven minutes on two cores.
"""

import json
import os
import statistics
import sys
import tempfile
from typing import Any

from benchmarks.side_by_side import Run, parser, ratio, report, run, spread

Shape = dict[str, Any]
SHAPES: dict[str, Shape] = {
  'SmolLM2-135M': dict(
    layers=30, hidden=576, head_dim=64, heads=9, kv=3, ffn=1536, vocab=49152, rows=4, micro=4, length=256
  ),
  'MobileLLM-350M': dict(
    layers=32, hidden=960, head_dim=64, heads=15, kv=5, ffn=2560, vocab=32000, rows=128, micro=8, length=1024
  ),
  'MobileLLM-1B': dict(
    layers=54, hidden=1280, head_dim=64, heads=20, kv=5, ffn=3584, vocab=32000, rows=128, micro=8, length=1024
  ),
}
# Recipes of configs/published.py that train these.
RECIPES = {'mobilellm_350m_to_125m': 'MobileLLM-350M', 'mobilellm_1b_to_600m': 'MobileLLM-1B'}
WIDTHS = {'all alike': 1, 'four': 4, 'all different': 1000}
STAGE = ('training', 'evaluation', 'compaction', 'stacking')  # each compiled once per stage
ONCE = ('scoring',)  # and once per run
PEAK, USED = 989e12, 0.4  # bf16 FLOP/s of an H100, and the fraction that training reaches
DEVICES = (1, 8)


def pruned(shape: Shape, distinct: int) -> Shape:
  """The shape with `widths`, [KV heads, channels] by layer: about 80 %, at most `distinct` kinds."""
  kinds = min(distinct, shape['layers'])

  def width(i: int) -> list[int]:
    kind = i % kinds
    return [max(1, shape['kv'] - kind % 2), shape['ffn'] * 9 // 10 - kind * max(1, shape['ffn'] // 200)]

  return shape | {'widths': [width(i) for i in range(shape['layers'])]}


def child(module: str, *arguments: str, cache: str = '') -> Run:
  """Runs a program of benchmarks/programs; `cache`: its directory of compiled programs."""
  kept = {
    'JAX_ENABLE_COMPILATION_CACHE': 'true',
    'JAX_COMPILATION_CACHE_DIR': cache,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }
  off = {'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  command = [sys.executable, '-m', f'benchmarks.programs.{module}', *arguments]
  found = run(command, kept if cache else off)
  print(f'{module}: {found.seconds:.1f} s {json.dumps(found.answer)[:300]}', file=sys.stderr, flush=True)
  return found


def cold_and_warm(shape: Shape, names: tuple[str, ...]) -> dict[str, Any]:
  """Seconds of each program cold and warm, cache hits of the warm process, and bytes left on disk."""
  with tempfile.TemporaryDirectory() as cache:
    cold, warm = (
      child('compile_stage', json.dumps(shape), ','.join(names), cache=cache).answer for _ in range(2)
    )
    size = sum(entry.stat().st_size for entry in os.scandir(cache))
  return {'cold': cold['programs'], 'warm': warm['programs'], 'hits': warm['hits'], 'bytes': size}


def seconds(programs: dict[str, dict[str, float]], names: tuple[str, ...]) -> float:
  """Total wall seconds of these programs."""
  return sum(programs[name]['trace'] + programs[name]['xla'] for name in names)


def measure(shapes: dict[str, Shape], rounds: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
  """The rounds by shape and widths; all programs if all layers differ, else only training."""
  found: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for _ in range(rounds):
    for name, shape in shapes.items():
      for widths, distinct in WIDTHS.items():
        programs = STAGE + ONCE if widths == 'all different' else STAGE[:1]
        found.setdefault((name, widths), []).append(cold_and_warm(pruned(shape, distinct), programs))
  return found


def training_table(found: dict[tuple[str, str], list[dict[str, Any]]], shapes: dict[str, Shape]) -> str:
  lines = [
    '| training step | layers | widths | trace and lower, s | XLA, s | CPU s | warm: all, s | CPU s |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for (name, widths), rounds in found.items():
    cold, warm = ([r[kind]['training'] for r in rounds] for kind in ('cold', 'warm'))
    cells = [spread([c[part] for c in cold], 1) for part in ('trace', 'xla', 'cpu')]
    cells += [spread([w['trace'] + w['xla'] for w in warm], 1), spread([w['cpu'] for w in warm], 1)]
    lines.append(f'| {name} | {shapes[name]["layers"]} | {widths} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def stage_table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
  """All programs of a stage, if all layers differ."""
  lines = [
    f'| all different | {" | ".join(f"{name}, s" for name in STAGE)} | a stage, s | warm, s | '
    f'once a run: scoring, s | MB on disk |',
    '|---' * (len(STAGE) + 5) + '|',
  ]
  for (name, widths), rounds in found.items():
    if widths != 'all different':
      continue
    cold = [r['cold'] for r in rounds]
    cells = [spread([seconds(c, (program,)) for c in cold], 1) for program in STAGE]
    cells += [spread([seconds(r[kind], STAGE) for r in rounds], 1) for kind in ('cold', 'warm')]
    cells += [spread([seconds(c, ONCE) for c in cold], 1), f'{rounds[0]["bytes"] / 1e6:.1f}']
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def share(stages: float, stage: float, once: float, flops: float, devices: int) -> float:
  """The share of compiling in the total time of compiling and training."""
  compiling = stages * stage + once
  return compiling / (compiling + flops / (devices * PEAK * USED))


def recipe_table(found: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
  shapes = {recipe: SHAPES[name] for recipe, name in RECIPES.items()}
  known = child('recipe_arithmetic', json.dumps(shapes)).answer
  lines = [
    '| recipe | stages | tokens | EFLOP | compiling, s | '
    + ' | '.join(f'training on {n} H100, h | share' for n in DEVICES)
    + ' |',
    '|---' * (5 + 2 * len(DEVICES)) + '|',
  ]
  for recipe, figures in known.items():
    cold = [r['cold'] for r in found[RECIPES[recipe], 'all different']]
    stage, once = (statistics.median(seconds(c, names) for c in cold) for names in (STAGE, ONCE))
    stages, flops = figures['stages'], figures['flops']
    cells = [f'{stages}', f'{figures["tokens"] / 1e9:.2f} B', f'{flops / 1e18:.1f}']
    cells.append(f'{stages * stage + once:.0f}')
    for n in DEVICES:
      part = share(stages, stage, once, flops, n)
      cells += [f'{flops / (n * PEAK * USED) / 3600:.2f}', f'{part:.1%}']
    lines.append(f'| `{recipe}` | {" | ".join(cells)} |')
  return '\n'.join(lines)


def peer_text(shape: Shape, layers: int, rounds: int) -> str:
  """Compares torch.compile with ours, in turn, at fewer layers."""
  shape = pruned(shape | {'layers': layers}, layers)
  text, ours, theirs = json.dumps(shape), list[float](), list[float]()
  for _ in range(rounds):
    ours.append(seconds(child('compile_stage', text, 'training').answer['programs'], ('training',)))
    theirs.append(child('compile_torch', text).answer['compile'])
  return (
    f'{layers} layers of SmolLM2-135M, all different: our training step {spread(ours, 1)} s, torch.compile '
    f"of transformers' forward and backward {spread(theirs, 1)} s, {ratio(theirs, ours, 1)} times as long."
  )


def main(arguments: list[str] | None = None) -> None:
  options = parser(__doc__, 1)
  options.add_argument('--peer', type=int, default=4, help='layers of torch.compile beside ours; 0 = none')
  args = options.parse_args(arguments)
  # First, because PyTorch may be missing.
  peer = [peer_text(SHAPES['SmolLM2-135M'], args.peer, args.rounds)] if args.peer else []
  found = measure(SHAPES, args.rounds)
  parts = [
    'Cold: nothing on disk. Warm: the process again, its programs on disk. fp32, CPU; '
    f'{args.rounds} round(s), median (lowest–highest). The limit is the warm run: tracing, and reading the '
    'program.',
    training_table(found, SHAPES),
    stage_table(found),
    'Reckoned, not run: compile seconds from above times the stages of configs/published.py, all layers '
    f'different, against training FLOPs at {USED:.0%} of {PEAK / 1e12:.0f} TFLOP/s a device. Compiling for a '
    'GPU takes other seconds than for this CPU. Aim: below 2 %.',
    recipe_table(found),
  ]
  report('Compile time', '\n\n'.join(parts + peer), args.write)


if __name__ == '__main__':
  main()
