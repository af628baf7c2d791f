"""Quantises an exported model's weights to 4 bits for vLLM, by GPTQ, with LLM Compressor.

    python -m venv .venv-quantise
    .venv-quantise/bin/pip install llmcompressor==0.14.0.1 transformers==5.17.0
    .venv-quantise/bin/python examples/quantise_4bit.py MODEL OUT --text=calibration.txt [--held-out=b.txt]

MODEL is a directory of the format hf or hf_padded; the former needs --trust-remote-code. OUT is a directory
of the format compressed-tensors, which vLLM and transformers read. All linear layers but the head are
quantised (Frantar et al., arXiv 2210.17323), in groups of 128, 64 or 32 weights: the most of which every row
is a multiple. prune.serve=awq makes MLP widths multiples of 128. With --held-out, perplexity before and after
is printed. This program needs only LLM Compressor's environment, not adapt-jax.
"""

import argparse
import math
import pathlib
import sys
import tempfile
from typing import Any, NoReturn

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUPS = (128, 64, 32)
HEAD = 'lm_head'


def refuse(message: str) -> NoReturn:
  print(f'error: {message}', file=sys.stderr)
  sys.exit(2)


def windows(tokenizer: Any, text: str, count: int, length: int) -> torch.Tensor:
  """At most `count` windows of `length` tokens, spread evenly over a text file: int64 [N, T].

  If the tokenizer begins texts with BOS, every window begins with it: a Gemma needs that.
  """
  ids = tokenizer(pathlib.Path(text).read_text(encoding='utf-8'), verbose=False)['input_ids']
  rows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
  if not len(rows):
    refuse(f'{text} has only {len(ids)} tokens, fewer than one window of {length}: give more text')
  if ids[0] == tokenizer.bos_token_id:
    rows[:, 0] = ids[0]
  return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def perplexity(model: Any, rows: torch.Tensor) -> float:
  with torch.no_grad():
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
  return math.exp(sum(losses) / len(losses))


def group_size(model: Any) -> int:
  """The largest of GROUPS that divides the rows of all matrices that are quantised."""
  linear = {name: x for name, x in model.named_modules() if isinstance(x, torch.nn.Linear) and name != HEAD}
  for size in GROUPS:
    if not any(x.in_features % size for x in linear.values()):
      return size
  name, x = next((n, x) for n, x in linear.items() if x.in_features % GROUPS[-1])
  refuse(f'{name} has {x.in_features} inputs, no multiple of {GROUPS[-1]}: prune.serve=awq aligns MLPs')


def quantise(model: Any, rows: torch.Tensor, trusted: bool) -> int:
  """Quantises `model` in place on the calibration rows; returns the group size.

  trusted: whether code of the model's directory may be run.
  """
  size = group_size(model)
  weights = QuantizationArgs(num_bits=4, type='int', symmetric=True, strategy='group', group_size=size)
  groups = {'all': QuantizationScheme(targets=['Linear'], weights=weights)}
  recipe = GPTQModifier(config_groups=groups, ignore=[HEAD])
  data = Dataset.from_dict({'input_ids': rows.tolist(), 'attention_mask': torch.ones_like(rows).tolist()})
  count, length = rows.shape
  layers = [type(model.model.layers[0]).__name__]
  options = {'num_calibration_samples': count, 'max_seq_length': length, 'sequential_targets': layers}
  oneshot(
    model=model,
    dataset=data,
    recipe=recipe,
    pipeline='sequential',
    trust_remote_code_model=trusted,
    **options,
  )
  return size


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('model')
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('--text', required=True, help='calibration text, a UTF-8 file')
  parser.add_argument('--held-out', help='text to measure perplexity on, a UTF-8 file')
  parser.add_argument('--samples', type=int, default=128)
  parser.add_argument('--length', type=int, default=512, help='tokens of a window')
  parser.add_argument('--trust-remote-code', action='store_true')
  o = parser.parse_args()
  if o.out.exists():
    refuse(f'{o.out} exists: name a new directory')
  options = {'trust_remote_code': o.trust_remote_code, 'local_files_only': True}
  tokenizer = AutoTokenizer.from_pretrained(o.model, **options)
  rows = windows(tokenizer, o.text, o.samples, o.length)
  held_out = windows(tokenizer, o.held_out, 32, o.length) if o.held_out else None
  model = AutoModelForCausalLM.from_pretrained(o.model, dtype='auto', **options)
  before = None if held_out is None else perplexity(model, held_out)
  size = quantise(model, rows, o.trust_remote_code)
  o.out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix='.quantise-', dir=o.out.parent) as scratch:
    new = pathlib.Path(scratch, 'model')
    model.save_pretrained(new, save_compressed=True)
    tokenizer.save_pretrained(new)
    new.rename(o.out)
  megabytes = sum(file.stat().st_size for file in o.out.glob('*.safetensors')) / 1e6
  print(f'{o.out}: 4 bits in groups of {size}, {megabytes:.1f} MB')
  if held_out is not None:
    written = AutoModelForCausalLM.from_pretrained(o.out, dtype='auto', **options)
    print(f'perplexity on {o.held_out}: {before:.2f} before, {perplexity(written, held_out):.2f} after')


if __name__ == '__main__':
  main()
