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


def peaks(dtype: torch.dtype, size: int) -> dict[str, float]:
  """GFLOP/s of one big product, GB/s of reading a big array."""
  a, big = torch.ones(size, size, dtype=dtype), torch.ones(size * size * 16)
  product, read = (min(timed(work, 1)[1] for _ in range(5)) for work in (lambda: a @ a, big.sum))
  return {'gflops': 2e-9 * size**3 / product, 'read_gbs': 4e-9 * len(big) / read}


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
  """Tokens/s of prefill and of decoding with this many rows, and extra seconds of the first calls."""
  ids = random_ids(model.config.vocab_size, rows, s['prompt'])

  def work(new: int, cache: str | None) -> None:
    # Room for all new tokens even if one is made: a static cache of another size would be recompiled.
    def enough(found: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
      return torch.full((rows,), found.shape[1] >= s['prompt'] + new)

    options = {'max_new_tokens': s['new'], 'min_new_tokens': s['new'], 'do_sample': False, 'pad_token_id': 0}
    mask = torch.ones_like(ids)
    model.generate(
      ids, attention_mask=mask, cache_implementation=cache, stopping_criteria=[enough], **options
    )

  prefill, decode, first = [], [], 0.0
  for cache in caches:
    whole, one = (timed(lambda n=new, c=cache: work(n, c), s['repeats']) for new in (s['new'], 1))
    prefill.append(ids.numel() / one[1])
    decode.append(rows * (s['new'] - 1) / (whole[1] - one[1]))
    first += sum(pair[0] - pair[1] for pair in (whole, one))
  return {f'prefill_{rows}': max(prefill), f'decode_{rows}': max(decode), f'generate_{rows}_compile': first}


def main(directory: str, settings: str) -> None:
  s = json.loads(settings)
  dtype = getattr(torch, s['dtype'])
  model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype).eval()
  batches, caches = [1, s['batch']], [None, 'static']
  if s['compile']:
    model = copy.copy(model)
    model.forward = torch.compile(model.forward, dynamic=False)
    batches, caches = [s['batch']], ['static']
  answer: dict[str, Any] = peaks(dtype, s['peak'])
  with torch.inference_mode():
    answer |= evaluate(model, s, batches)
    for rows in s['rows']:
      answer |= generate(model, s, rows, caches)
  print(json.dumps(answer))


if __name__ == '__main__':
  main(*sys.argv[1:])
