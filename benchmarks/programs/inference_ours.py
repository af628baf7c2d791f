"""Evaluation and generation in adapt-jax: DIRECTORY SETTINGS (JSON). For benchmarks/inference.py."""

import json
import statistics
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.generation.generator import Generator, Timings
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import load_source
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.formats.source import open_source


def random_ids(vocab: int, rows: int, length: int) -> np.ndarray:
  """Random ids [rows, length], the same for every program."""
  return np.random.default_rng(rows * length).integers(0, vocab, (rows, length)).astype(np.int32)


def flops(config: ModelConfig, length: int, head_tokens: int) -> float:
  """FLOPs of one row's forward pass: two per weight and token, causal attention, the head on some tokens."""
  head = config.vocab_size * config.hidden_size
  body = count_params(config) - head * (1 if config.tie_embeddings else 2)
  queries = sum(shape.num_heads for shape in config.layers) * config.head_dim
  return 2.0 * (body * length + head * head_tokens + queries * length * length)


def evaluate(config: ModelConfig, params: Any, dtype: Any, s: dict[str, Any]) -> dict[str, Any]:
  """Tokens/s of measuring perplexity on windows, the loss, and compile seconds."""
  tokens = random_ids(config.vocab_size, s['windows'], s['window'])
  targets = np.ones(tokens.shape, bool)
  targets[:, 0] = False
  evaluator = Evaluator(Blocks(tokens, targets, 1), s['batch'], compiler=Compiler(), dtype=dtype)
  seconds = []
  for _ in range(1 + s['repeats']):
    start = time.perf_counter()
    perplexity = evaluator.perplexity(config, params, 'evaluation')
    seconds.append(time.perf_counter() - start)
  usual = statistics.median(seconds[1:])
  return {
    'evaluation': tokens.size / usual,
    'loss': float(np.log(perplexity)),
    'evaluation_compile': seconds[0] - usual,
  }


def generate(config: ModelConfig, params: Any, dtype: Any, s: dict[str, Any], rows: int) -> dict[str, float]:
  """Tokens/s of prefill and of decoding with this many rows, and compile seconds."""
  generator = Generator(config, params, compiler=Compiler(), dtype=dtype, max_batch=rows)
  prompts = random_ids(config.vocab_size, rows, s['prompt']).tolist()
  prefill, decode = [], []
  generator.generate(prompts, s['new'])
  compiled = generator.timings.compile_seconds
  for _ in range(s['repeats']):
    generator.timings = Timings()
    generator.generate(prompts, s['new'])
    prefill.append(generator.timings.prefill_rate)
    decode.append(generator.timings.decode_rate)
  return {
    f'prefill_{rows}': statistics.median(prefill),
    f'decode_{rows}': statistics.median(decode),
    f'generate_{rows}_compile': compiled,
  }


def limits(config: ModelConfig, dtype: Any, s: dict[str, Any]) -> dict[str, float]:
  """Cost of a unit of each figure: FLOPs per token, and bytes read per decoding step of all rows."""
  found = {'evaluation_flops': flops(config, s['window'], s['window']) / s['window']}
  weights = count_params(config) * dtype.itemsize
  if not config.tie_embeddings:  # only the tokens' rows of the table are read
    weights -= config.vocab_size * config.hidden_size * dtype.itemsize
  heads = sum(shape.num_kv_heads for shape in config.layers)
  for rows in s['rows']:
    context = s['prompt'] + s['new'] / 2
    found[f'prefill_{rows}_flops'] = flops(config, s['prompt'], 1) / s['prompt']
    found[f'decode_{rows}_flops'] = flops(config, 1, 1)
    found[f'decode_{rows}_bytes'] = weights + rows * 2 * heads * config.head_dim * context * dtype.itemsize
  return found


def main(directory: str, settings: str) -> None:
  s = json.loads(settings)
  dtype, source = jnp.dtype(s['dtype']), open_source(directory)
  config, params = source.config, load_source(source, dtype)
  answer = limits(config, dtype, s) | evaluate(config, params, dtype, s)
  for rows in s['rows']:
    answer |= generate(config, params, dtype, s, rows)
  print(json.dumps(answer))


if __name__ == '__main__':
  main(*sys.argv[1:])
