"""A pruned model in the programs it is exported for: agreement with ours, size, tokens/s vs. the dense one.

    make demo test-serving
    python -m benchmarks.serving [--pruned=out/demo] [--dense=data/SmolLM2-135M-Instruct.Q4_1.gguf]

Both models are exported in every form (fp32), and each program runs both in turn, dense and pruned, --rounds
times, each time in a new process: greedy decoding of 32 tokens after a prompt of 16, on two threads. The
difference is between log-probabilities of 30 tokens of text and those of our forward pass in fp32. Programs
that are not installed are left out.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import llama

ROOT = pathlib.Path(__file__).resolve().parents[1]
SERVING = ROOT / '.venv-serving'
TEXT = 'The history of the city begins with a small settlement on the bank of the river, where the old road'
PYTHON = pathlib.Path(sys.executable)
HERE = str(ROOT)
OLD = f'{ROOT / ".venv/transformers-4.57"}{os.pathsep}{HERE}'
# Program, format, Python, script of benchmarks/programs, its additional module path.
PROGRAMS: tuple[tuple[str, str, pathlib.Path, str, str], ...] = (
  ('adapt-jax', 'hf', PYTHON, 'run_ours.py', HERE),
  ('transformers 5', 'hf', PYTHON, 'run_transformers.py', HERE),
  ('transformers 4.57', 'hf', PYTHON, 'run_transformers.py', OLD),
  ('vLLM', 'hf', SERVING / 'vllm/bin/python', 'run_vllm.py', ''),
  ('MLX-LM', 'hf', SERVING / 'mlx/bin/python', 'run_mlx.py', ''),
  ('transformers 5', 'hf_padded', PYTHON, 'run_transformers.py', HERE),
  *(
    ('llama.cpp', f'gguf/model-{kind}.gguf', PYTHON, 'run_llama_cpp.py', HERE)
    for kind in ('F32', 'F16', 'Q8_0', 'Q4_0')
  ),
)


def export(source: str, path: pathlib.Path) -> None:
  """Exports a model in every format, by main.py."""
  if (path / 'report.json').exists():
    return
  command = [PYTHON, ROOT / 'main.py', '--config=configs/base.py', '--mode=export', f'--workdir={path}']
  command += [f'--config.model.source={source}', '--config.export.formats=hf,hf_padded,gguf']
  command += ['--config.export.dtype=float32', '--config.export.gguf_types=F32,F16,Q8_0,Q4_0']
  subprocess.run([str(x) for x in command], check=True, cwd=ROOT)


def ask(
  program: Any, path: pathlib.Path, prompts: list[list[int]], directory: pathlib.Path
) -> dict[str, Any]:
  """{'logprobs': [rows, T-1], 'tokens_per_second': x} of one program on one export, in a new process."""
  _, _, python, script, modules = program
  asked, answer = directory / 'prompts.json', directory / 'answer.json'
  asked.write_text(json.dumps(prompts))
  command = [python, ROOT / 'benchmarks/programs' / script, path, asked, answer, 'speed']
  fixed = {'HF_HOME': str(directory / 'cache'), 'OMP_NUM_THREADS': '2', 'PYTHONPATH': modules}
  done = subprocess.run(
    [str(x) for x in command], env=os.environ | fixed, capture_output=True, text=True, check=False
  )
  if done.returncode:
    raise SystemExit(f'{script} {path}:\n{done.stderr[-3000:]}')
  found: dict[str, Any] = json.loads(answer.read_text())
  return found


def logprobs(path: pathlib.Path, prompts: list[list[int]]) -> np.ndarray:
  """Log-probabilities of each prompt's tokens after the first, by our forward pass in fp32."""
  source = open_source(str(path))
  rows = np.array(prompts)
  logits = jax.jit(lambda p, t: llama.apply(source.config, p, t))(source.load_params(np.float32), rows)
  scores = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
  return np.take_along_axis(scores, rows[:, 1:, None], -1)[..., 0]


def spread(values: list[float]) -> str:
  return f'{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--pruned', default='out/demo')
  parser.add_argument('--dense', default='data/SmolLM2-135M-Instruct.Q4_1.gguf')
  parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'out/exports')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  models = {'dense': args.out / 'dense', 'pruned': args.out / 'pruned'}
  for name, path in models.items():
    export(getattr(args, name), path)
  ids = open_source(str(models['pruned'] / 'hf')).load_tokenizer()(TEXT)['input_ids']
  prompts = [ids[:16], ids[1:17]]
  expected = logprobs(models['pruned'] / 'hf', prompts)
  print(
    '| program | form | log-probability difference | MB pruned (dense) | tokens/s pruned | dense | ratio |'
  )
  print('|---|---|---|---|---|---|---|', flush=True)
  for program in PROGRAMS:
    name, form, python, *_ = program
    if not python.exists():
      print(f'{name} is not installed: make test-serving does it', file=sys.stderr)
      continue
    speeds: dict[str, list[float]] = {model: [] for model in models}
    difference = 0.0
    for _ in range(args.rounds):
      for model, path in models.items():
        found = ask(program, path / form, prompts, args.out)
        speeds[model].append(found['tokens_per_second'])
        if model == 'pruned':
          difference = float(np.abs(np.array(found['logprobs']) - expected).max())
    sizes = {model: open_source(str(path / form)).stored_bytes() / 1e6 for model, path in models.items()}
    ratios = [p / d for p, d in zip(speeds['pruned'], speeds['dense'], strict=True)]
    print(
      f'| {name} | `{form}` | {difference:.1e} | {sizes["pruned"]:.1f} ({sizes["dense"]:.1f}) '
      f'| {spread(speeds["pruned"])} | {spread(speeds["dense"])} | {statistics.median(ratios):.2f} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
