"""The models of the benchmarks: SmolLM2-135M-Instruct, dense and pruned to 80 %, as fp32 exports."""

import json
import math
import pathlib
import subprocess
import sys

from benchmarks.side_by_side import ROOT

GGUF = ROOT / 'data/SmolLM2-135M-Instruct.Q4_1.gguf'
OUT = ROOT / 'out/benchmarks'


def dense() -> pathlib.Path:
  """The Hugging Face directory of the dense model; made once."""
  return _made('dense', '--config=configs/base.py', '--mode=export', f'--config.model.source={GGUF}')


def pruned() -> pathlib.Path:
  """Same for the model pruned as in the demo, not healed; takes about two minutes."""
  flags = '--config.prune.heal=0', '--config.prune.calibration.own=0', '--config.evaluate.health=False'
  return _made('pruned', '--config=configs/demo.py', '--mode=prune', *flags)


def _made(name: str, *arguments: str) -> pathlib.Path:
  workdir = OUT / name
  if not (workdir / 'report.json').exists():
    print(f'making the {name} model', file=sys.stderr, flush=True)
    command = [sys.executable, 'main.py', *arguments, f'--workdir={workdir}', '--config.export.dtype=float32']
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
  return workdir / 'hf'


def _shapes(directory: pathlib.Path) -> dict[str, list[int]]:
  """The shape of every tensor in a single safetensors file, from its header."""
  with open(directory / 'model.safetensors', 'rb') as file:
    header = json.loads(file.read(int.from_bytes(file.read(8), 'little')))
  return {name: entry['shape'] for name, entry in header.items() if name != '__metadata__'}


def parameters(directory: pathlib.Path) -> int:
  """Stored parameters of an export."""
  return sum(math.prod(shape) for shape in _shapes(directory).values())


def head_weights(directory: pathlib.Path) -> int:
  """Weights of the output projection, tied or not."""
  shapes = _shapes(directory)
  return math.prod(shapes.get('lm_head.weight') or shapes['model.embed_tokens.weight'])


def forward_flops(directory: pathlib.Path, length: int) -> float:
  """FLOPs per token: two per weight of a product, including the head, and attention over half the row."""
  shapes = _shapes(directory)
  weights = sum(math.prod(s) for n, s in shapes.items() if n.endswith('_proj.weight'))
  weights += head_weights(directory)
  attention = sum(s[0] for n, s in shapes.items() if n.endswith('q_proj.weight'))
  return 2.0 * weights + 2.0 * length * attention
