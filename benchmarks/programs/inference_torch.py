"""Evaluation and generation in transformers: DIRECTORY SETTINGS (JSON). For benchmarks/inference.py.

Each runs in the ways that a user would try, and the fastest counts: evaluation with one window and with
`batch` at once, generation with the dynamic cache and with the static one. With `compile`, the forward pass
uses torch.compile with `batch` windows and the static cache only, since shapes must not change.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM


def random_ids(vocab: int, rows: int, length: int) -> torch.Tensor:
  """Random ids [rows, length], the same for every program."""
  return torch.from_numpy(np.random.default_rng(rows * length).integers(0, vocab, (rows, length)))


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
  """Seconds of the first call, and the median of the others."""
  seconds = []
  for _ in range(1 + repeats):
    start = time.perf_counter()
    work()
    seconds.append(time.perf_counter() - start)
  return seconds[0], statistics.median(seconds[1:])


def evaluate(model: Any, s: dict[str, Any], batches: list[int]) -> dict[str, Any]:
  """Tokens/s of measuring perplexity on windows, the loss, and extra seconds of the first call."""
  tokens = random_ids(model.config.vocab_size, s['windows'], s['window'])
  loss = 0.0

  def work(batch: int) -> None:
    nonlocal loss
    total = 0.0
    for ids in tokens.split(batch):
      logits = model(ids, use_cache=False).logits[:, :-1]
      total += functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction='sum'
      ).item()
    loss = total / tokens[:, 1:].numel()

  found = [timed(lambda size=batch: work(size), s['repeats']) for batch in batches]
  first, usual = min(found, key=lambda pair: pair[1])
  return {'evaluation': tokens.numel() / usual, 'loss': loss, 'evaluation_compile': first - usual}


def generate(model: Any, s: dict[str, Any], rows: int, caches: list[str | None]) -> dict[str, float]:
  """Tokens/s of prefill and of decoding with this many rows, and extra seconds of the first calls.

  The prefill ends, and decoding begins, when the first new token is there.
  """
  ids = random_ids(model.config.vocab_size, rows, s['prompt'])
  options = {'max_new_tokens': s['new'], 'min_new_tokens': s['new'], 'do_sample': False, 'pad_token_id': 0}
  mask = torch.ones_like(ids)

  def seconds(cache: str | None) -> tuple[float, float]:
    stamps = [time.perf_counter()]

    def stamp(*_: Any, **__: Any) -> torch.Tensor:  # called after each token; never stops
      stamps.append(time.perf_counter())
      return torch.zeros(rows, dtype=torch.bool)

    model.generate(ids, attention_mask=mask, cache_implementation=cache, stopping_criteria=[stamp], **options)
    return stamps[1] - stamps[0], stamps[-1] - stamps[1]

  prefill, decode, extra = [], [], 0.0
  for cache in caches:
    first, *others = [seconds(cache) for _ in range(1 + s['repeats'])]
    usual = [statistics.median(column) for column in zip(*others, strict=True)]
    prefill.append(ids.numel() / usual[0])
    decode.append(rows * (s['new'] - 1) / usual[1])
    extra += sum(first) - sum(usual)
  return {f'prefill_{rows}': max(prefill), f'decode_{rows}': max(decode), f'generate_{rows}_compile': extra}


def main(directory: str, settings: str) -> None:
  s = json.loads(settings)
  dtype = getattr(torch, s['dtype'])
  model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype).eval()
  batches, caches = [1, s['batch']], [None, 'static']
  if s['compile']:
    model = copy.copy(model)
    model.forward = torch.compile(model.forward, dynamic=False)
    batches, caches = [s['batch']], ['static']
  with torch.inference_mode():
    answer = evaluate(model, s, batches)
    for rows in s['rows']:
      answer |= generate(model, s, rows, caches)
  print(json.dumps(answer))


if __name__ == '__main__':
  main(*sys.argv[1:])
