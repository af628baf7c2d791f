"""What the finished model measures beside what `prune.target` asked for: its time, or its file."""

import statistics
from typing import Any

import jax
import numpy as np

from adapt_jax.config.options import RunOptions
from adapt_jax.generation.generator import Generator
from adapt_jax.generation.in_turn import time_in_turn
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.processes import say
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pruning import latency

_REPEATS = 5


def measured_latency(
  options: RunOptions, inputs: Inputs, config: ModelConfig, params: Params
) -> dict[str, float]:
  """Milliseconds of the dense and the finished model: medians, and the median of their ratios.

  They are of a request, or of a decoding step, and then with the finished model's tokens per second. Both
  run in turn, five times. Empty for other targets, for a table of another kind of device or dtype than this
  run's, and in a run of several processes. Raises `Preempted`.
  """
  if (table := inputs.budget.measured) is None:
    return {}
  if jax.process_count() > 1 or table.where != latency.here(inputs.dtype):
    say('the latency is not measured: prune.latency_table is of another device or dtype')
    return {}
  request = table.request
  rng = np.random.default_rng(options.seed)
  shape = request['batch'], request['prompt_length']
  prompts = rng.integers(0, config.vocab_size, shape).tolist()
  models = ((inputs.config, inputs.model.load_params(inputs.dtype)), (config, params))
  generators = [
    Generator(config, params, compiler=Compiler(), dtype=inputs.dtype, max_batch=request['batch'])
    for config, params in models
  ]
  timings = time_in_turn(generators, prompts, request['new_tokens'], _REPEATS, 'latency')
  decode = inputs.budget.kind == 'decode'
  steps = request['new_tokens'] - 1
  dense, finished = (
    [1000 * (t.decode_seconds / steps if decode else t.prefill_seconds + t.decode_seconds) for t in of]
    for of in timings
  )
  ratios = [after / before for before, after in zip(dense, finished, strict=True)]
  return {
    'dense': statistics.median(dense),
    'finished': statistics.median(finished),
    'ratio': statistics.median(ratios),
    **({'tokens_per_second': statistics.median(t.decode_rate for t in timings[1])} if decode else {}),
  }


def measured_file(options: RunOptions, exports: dict[str, dict[str, Any]]) -> dict[str, float]:
  """MB of the exported file that a target in MB counts; empty for other targets, or if it was not written."""
  limit = options.prune.limit
  written = [of for name, of in exports.items() if name.startswith('gguf/') and of['type'] == limit.type]
  written = written if limit.type else [of for name, of in exports.items() if name == 'hf']
  return {'finished': written[0]['bytes'] / 1e6} if limit.kind == 'file' and written else {}
