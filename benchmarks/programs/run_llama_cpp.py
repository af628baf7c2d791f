"""One .gguf file in llama.cpp: FILE PROMPTS.json OUT.json speed. For benchmarks/serving.py."""

import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from llama_cpp_py_sync import Llama

from tests.support.llama_cpp import logits


def main(file: str, prompts: str, out: str, _: str) -> None:
  rows = json.loads(pathlib.Path(prompts).read_text())
  precise = {'flash_attn_type': 0, 'type_k': 'f32', 'type_v': 'f32'}
  model: Any = Llama(file, n_ctx=128, n_batch=128, n_threads=2, **precise)
  scores = []
  for row in rows:
    model._clear_context_state()
    found = logits(model, row, 0)[:-1].astype(np.float64)
    found -= np.log(np.exp(found).sum(-1, keepdims=True))
    scores.append(found[range(len(row) - 1), row[1:]].tolist())
  rates = []
  for _ in range(3):
    model._clear_context_state()
    token = int(logits(model, rows[0], 0)[-1].argmax())
    start = time.perf_counter()
    for step in range(32):
      token = int(logits(model, [token], len(rows[0]) + step)[-1].argmax())
    rates.append(32 / (time.perf_counter() - start))
  pathlib.Path(out).write_text(json.dumps({'logprobs': scores, 'tokens_per_second': max(rates)}))


if __name__ == '__main__':
  main(*sys.argv[1:])
