"""A training step as a PyTorch user would write it: DIRECTORY DTYPE STEPS. For benchmarks/training.py.

DTYPE is float32, bfloat16 (autocast, fp32 weights), or either with -compile.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

BATCH, LENGTH = 4, 256


def main(directory: str, dtype: str, steps: str) -> None:
  torch.manual_seed(0)
  model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).train()
  forward = torch.compile(model) if dtype.endswith('-compile') else model
  optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0, fused=True)
  tokens = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
  result: dict = {'tokens_per_second': []}
  for _ in range(int(steps) + 1):
    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype.startswith('bfloat16')):
      loss = forward(tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    result['loss'] = loss.item()
    result['tokens_per_second'].append(tokens.numel() / (time.perf_counter() - start))
  result['compile_seconds'] = tokens.numel() / result['tokens_per_second'].pop(0)  # with the first step
  print(json.dumps(result))


if __name__ == '__main__':
  main(*sys.argv[1:])
