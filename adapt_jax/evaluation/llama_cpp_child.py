"""Measures one .gguf file with llama.cpp, in a process of its own, which a failed assertion ends.

As a program: JOB.json OUT.json (`llama_cpp.quality`, `llama_cpp.speed`). It imports nothing of adapt-jax and
prints a line for each window.
"""

import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

_PIECE = 256  # tokens that llama.cpp computes at once, whose logits it holds
_ROWS = 16  # of them that are handled at once: arrays of a few megabytes stay in the CPU's cache


class Model:
  """A file opened on the CPU, with llama.cpp's defaults, such as a KV cache in F16."""

  def __init__(self, file: str, threads: int, context: int, batch: int):
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    self._lib, self._ffi = get_lib(), get_ffi()
    self._lib.llama_backend_init()
    options = self._lib.llama_model_default_params()
    options.n_gpu_layers = 0
    self._model = self._lib.llama_model_load_from_file(file.encode(), options)
    if self._model == self._ffi.NULL:
      raise RuntimeError('it cannot be loaded')
    options = self._lib.llama_context_default_params()
    options.n_ctx, options.n_batch = context, batch
    options.n_threads = options.n_threads_batch = threads
    self._context = self._lib.llama_init_from_model(self._model, options)
    if self._context == self._ffi.NULL:
      raise RuntimeError('it cannot be run')
    self._batch = self._lib.llama_batch_init(batch, 0, 1)
    self.vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))

  def clear(self) -> None:
    """Forgets all tokens."""
    self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

  def decode(self, tokens: list[int], past: int, every: bool) -> float:
    """Runs tokens that follow `past` others; returns the seconds. Logits of all or of the last are kept."""
    batch = self._batch
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
      batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, past + i, 1
      batch.seq_id[i][0], batch.logits[i] = 0, every or i == len(tokens) - 1
    start = time.perf_counter()
    if code := self._lib.llama_decode(self._context, batch):
      raise RuntimeError(f'llama_decode returned {code}')
    self._lib.llama_synchronize(self._context)
    return time.perf_counter() - start

  def log_probabilities(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
    """Of the tokens after each one of a window [T], float32 [up to 16, V] at a time."""
    self.clear()
    for past in range(0, len(tokens), _PIECE):
      piece = tokens[past : past + _PIECE].tolist()
      self.decode(piece, past, every=True)
      held = self._ffi.buffer(self._lib.llama_get_logits(self._context), 4 * len(piece) * self.vocab_size)
      every = np.frombuffer(held, np.float32).reshape(len(piece), -1)
      for start in range(0, len(piece), _ROWS):
        logits = every[start : start + _ROWS]
        logits = logits - logits.max(-1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def quality(job: dict[str, Any]) -> dict[str, Any]:
  """Mean loss and KL(reference ‖ model) on each text; writes the reference first if that is asked."""
  with np.load(job['windows']) as saved:
    texts = [(saved[f'tokens{i}'], saved[f'targets{i}']) for i in range(len(saved) // 2)]
  model = Model(job['file'], job['threads'], max(tokens.shape[1] for tokens, _ in texts), _PIECE)
  counts, row, found = [int(targets[:, 1:].sum()) for _, targets in texts], 0, []
  if job['writes']:
    shape = sum(counts), model.vocab_size
    reference = np.lib.format.open_memmap(job['reference'], 'w+', np.float16, shape)
  else:
    reference = np.load(job['reference'], mmap_mode='r')
  for (tokens, targets), count in zip(texts, counts, strict=True):
    loss = kl = 0.0
    for window, counted in zip(tokens, targets, strict=True):
      labels, past = np.append(window[1:], 0), 0
      counted = np.append(counted[1:], False)
      for logp in model.log_probabilities(window):
        here = slice(past, past := past + len(logp))
        logp, label = logp[counted[here]], labels[here][counted[here]]
        loss -= float(logp[np.arange(len(label)), label].sum(dtype=np.float64))
        rows = slice(row, row := row + len(label))
        if job['writes']:
          reference[rows] = logp
        else:
          kl += divergence(np.asarray(reference[rows], np.float32), logp)
      print(flush=True)
    found.append({'loss': loss / count, 'kl': kl / count})
  return {'texts': found}


def divergence(reference: np.ndarray, logp: np.ndarray) -> float:
  """Σ KL(reference ‖ model) over the rows of two arrays of log probabilities, the first one rounded."""
  p = np.exp(reference)
  total = p.sum(-1)  # not quite 1
  return float(((p * (reference - logp)).sum(-1) / total - np.log(total)).sum(dtype=np.float64))


def speed(job: dict[str, Any]) -> dict[str, float]:
  """Tokens per second of a prompt and of the tokens after it; the ids are random."""
  length, new = job['prompt_length'], job['new_tokens']
  model = Model(job['file'], job['threads'], length + new, length)
  ids = np.random.default_rng(job['seed']).integers(0, model.vocab_size, length + new).tolist()
  for count in (min(length, 32), 1):  # reads the weights from disk, and starts the threads
    model.clear()
    model.decode(ids[:count], 0, every=False)
  model.clear()
  prefill = model.decode(ids[:length], 0, every=False)
  decode = sum(model.decode([ids[past]], past, every=False) for past in range(length, length + new))
  return {'prefill': length / prefill, 'decode': new / decode}


if __name__ == '__main__':
  asked = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding='utf-8'))
  made = quality(asked) if 'windows' in asked else speed(asked)
  pathlib.Path(sys.argv[2]).write_text(json.dumps(made), encoding='utf-8')
