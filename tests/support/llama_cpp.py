"""The real llama.cpp, in a process of its own: a failed assertion in it ends the process.

As a program: python -m tests.support.llama_cpp JOBS OUT, with JOBS a JSON file of what `ask` takes; or
three arguments for each file that `quantise` writes.
"""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_llama_cpp = pytest.mark.skipif(
  not importlib.util.find_spec('llama_cpp_py_sync'), reason='no llama-cpp-py-sync for this platform'
)


@dataclasses.dataclass
class Job:
  """What to ask of one .gguf file: ids of texts, logits of rows of tokens, and greedy ids after each row."""

  path: pathlib.Path
  texts: list[str] = dataclasses.field(default_factory=list)
  rows: np.ndarray | list[list[int]] = dataclasses.field(default_factory=list)
  generate: int = 0


@dataclasses.dataclass
class Answer:
  """`ids` of each text, `logits` [rows, T, V], `greedy` [rows, generate]."""

  ids: list[list[int]]
  logits: np.ndarray
  greedy: list[list[int]]


def ask(jobs: dict[str, Job]) -> dict[str, Answer]:
  """What llama.cpp makes of some files, with flash attention off and a KV cache in F32.

  Raises AssertionError with llama.cpp's own words if one does not load or compute.
  """
  with tempfile.TemporaryDirectory() as directory:
    asked, out = pathlib.Path(directory, 'jobs.json'), pathlib.Path(directory, 'out')
    out.mkdir()
    fields = {
      name: [str(job.path), job.texts, np.asarray(job.rows).tolist(), job.generate]
      for name, job in jobs.items()
    }
    asked.write_text(json.dumps(fields))
    command = [sys.executable, '-m', 'tests.support.llama_cpp', str(asked), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors='replace')
    assert done.returncode == 0, f'llama.cpp: code {done.returncode}\n{done.stderr[-3000:]}'
    found = json.loads((out / 'found.json').read_text())
    return {
      name: Answer(ids, np.load(out / f'{i}.npy'), greedy)
      for i, (name, (ids, greedy)) in enumerate(found.items())
    }


def quantise(*files: tuple[pathlib.Path, pathlib.Path, str]) -> None:
  """Writes the second of each (file, new file, LlamaFileType as MOSTLY_Q4_K_M), as `llama-quantize` does."""
  words = [str(word) for file in files for word in file]
  command = [sys.executable, '-m', 'tests.support.llama_cpp', *words]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors='replace')
  assert done.returncode == 0, f'llama.cpp: code {done.returncode}\n{done.stderr[-3000:]}'


def _quantise(path: str, out: str, kind: str) -> None:
  from gguf import LlamaFileType
  from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

  lib, ffi = get_lib(), get_ffi()
  options = ffi.new('llama_model_quantize_params *', lib.llama_model_quantize_default_params())
  options.ftype, options.nthread, options.allow_requantize = LlamaFileType[kind], 1, True
  assert lib.llama_model_quantize(path.encode(), out.encode(), options) == 0


def _main(jobs: dict[str, list[Any]], out: pathlib.Path) -> None:
  found = {}
  for i, (name, job) in enumerate(jobs.items()):
    print(f'job {name}', file=sys.stderr, flush=True)
    ids, logits, greedy = _answer(*job)
    np.save(out / f'{i}.npy', np.array(logits, np.float32))
    found[name] = ids, greedy
  (out / 'found.json').write_text(json.dumps(found))


def _answer(path: str, texts: list[str], rows: list[list[int]], generate: int) -> tuple[Any, Any, Any]:
  from llama_cpp_py_sync import Llama

  longest = max(map(len, rows), default=1) + generate
  precise = {'flash_attn_type': 0, 'type_k': 'f32', 'type_v': 'f32'}
  model = Llama(path, n_ctx=longest, n_batch=longest, n_threads=1, **precise)
  ids = [model.tokenize(text, add_special=True, parse_special=True) for text in texts]
  all_logits, all_greedy = [], []
  for row in rows:
    model._clear_context_state()
    found = logits(model, row, 0)
    all_logits.append(found)
    greedy: list[int] = []
    while len(greedy) < generate:
      greedy.append(int(found[-1].argmax()))
      found = logits(model, greedy[-1:], len(row) + len(greedy) - 1)
    all_greedy.append(greedy)
  model.close()
  return ids, all_logits, all_greedy


def logits(model: Any, tokens: list[int], past: int) -> np.ndarray:
  """Logits [T, V] of tokens that follow `past` others."""
  lib, ffi = model._lib, model._ffi
  batch = lib.llama_batch_init(len(tokens), 0, 1)
  batch.n_tokens = len(tokens)
  for i, token in enumerate(tokens):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, past + i, 1, 1
    batch.seq_id[i][0] = 0
  code = lib.llama_decode(model._ctx, batch)
  lib.llama_batch_free(batch)
  assert code == 0, f'llama_decode: {code}'
  buffer = ffi.buffer(lib.llama_get_logits(model._ctx), 4 * len(tokens) * model.n_vocab)
  return np.frombuffer(buffer, np.float32).reshape(len(tokens), -1).copy()


if __name__ == '__main__':
  if len(sys.argv) > 3:
    for first in range(1, len(sys.argv), 3):
      _quantise(*sys.argv[first : first + 3])
  else:
    _main(json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2]))
