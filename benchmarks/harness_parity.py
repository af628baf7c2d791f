"""Compares our model in lm-evaluation-harness with the harness's own `hf` model, example by example.

    python -m benchmarks.harness_parity [--model=out/demo/hf] [--data=../shared/data] [--limit=300]
                                         [--tasks=piqa,openbookqa,lambada]

The tasks are those of scripts/local_tasks.py. Both models compute in fp32 on the CPU. Prints a Markdown
table. Needs PyTorch, transformers and accelerate (`pip install '.[test]'`).
"""

import argparse
import pathlib
import tempfile
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from adapt_jax.config.options import EvaluateOptions
from adapt_jax.evaluation.harness import check_tasks, evaluate_lm
from adapt_jax.evaluation.harness_lm import FlaxLM
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import load_source
from adapt_jax.models.formats.source import open_source
from scripts.local_tasks import TASKS, write_tasks

ROOT = pathlib.Path(__file__).parent.parent


def answers(samples: list[dict[str, Any]]) -> list[np.ndarray]:
  """(log-likelihood, is greedy) of every request of every example, [requests, 2]."""
  return [np.array([repeats[0] for repeats in sample['resps']], float) for sample in samples]


def compare(task: str, ours: Any, theirs: Any, seconds: tuple[float, float]) -> str:
  """A row of the table."""
  pairs = list(zip(answers(ours['samples'][task]), answers(theirs['samples'][task]), strict=True))
  # The most likely choice; for a single answer, whether greedy decoding gives it.
  same = [np.argmax(a[:, 0]) == np.argmax(b[:, 0]) if len(a) > 1 else a[0, 1] == b[0, 1] for a, b in pairs]
  worst = max(np.abs(a[:, 0] - b[:, 0]).max() for a, b in pairs)
  scores = [100 * results['results'][task]['acc,none'] for results in (ours, theirs)]
  return (
    f'| {task.removeprefix("local_")} | {len(pairs)} | {100 * np.mean(same):.2f} % | {worst:.1e} | '
    f'{scores[1]:.2f} | {scores[0]:.2f} | {seconds[1]:.0f} | {seconds[0]:.0f} |'
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--model', type=pathlib.Path, default=ROOT / 'out/demo/hf')
  parser.add_argument('--data', type=pathlib.Path, default=ROOT.parent / 'shared/data')
  parser.add_argument('--limit', type=int, default=300, help='examples of each task; 0 = all')
  parser.add_argument('--tasks', default=','.join(TASKS))
  parser.add_argument('--rows', type=int, default=16, help='of a batch; ours: of 128 tokens')
  args = parser.parse_args()
  for name in ('model', 'data'):
    if not getattr(args, name).is_dir():
      parser.error(f'--{name}={getattr(args, name)}: no such directory')
  from lm_eval.models.huggingface import HFLM

  source, compiler = open_source(str(args.model)), Compiler()
  options = {'compiler': compiler, 'dtype': jnp.float32, 'title': 'ours', 'tokens': args.rows * 128}
  params, tokenizer = load_source(source, jnp.float32), source.load_tokenizer()
  ours = FlaxLM(source.config, params, tokenizer, source.generation, **options)
  theirs = HFLM(str(args.model), device='cpu', dtype='float32', batch_size=args.rows, trust_remote_code=True)
  print('| task | examples | same answer | log-likelihoods off by | acc hf | ours | seconds hf | ours |')
  print('|---|---|---|---|---|---|---|---|', flush=True)
  with tempfile.TemporaryDirectory() as directory:
    write_tasks(args.data, pathlib.Path(directory))
    for task in (f'local_{name}' for name in args.tasks.split(',')):
      wanted = EvaluateOptions((), 128, args.rows, 0, (task,), '', directory, 0, args.limit)
      check_tasks(wanted)
      results, seconds = [], []
      for lm in (ours, theirs):
        start = time.monotonic()
        results.append(evaluate_lm(wanted, lm, log_samples=True))
        seconds.append(time.monotonic() - start)
      print(compare(task, *results, (seconds[0], seconds[1])), flush=True)
  print(f'\ncompiles: {compiler.counts["harness"]}')


if __name__ == '__main__':
  main()
