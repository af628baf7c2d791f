"""What a budget of latency measures at the end of a run: the request of its table, on this machine."""

import statistics

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
  """Milliseconds of a request of the dense and the finished model: medians, and the median of their ratios.

  Both run in turn, five times. Empty for other budgets, for a table of another kind of device or
  dtype than this run's, and in a run of several processes. Raises `Preempted`.
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
  dense, finished = ([1000 * (t.prefill_seconds + t.decode_seconds) for t in of] for of in timings)
  ratios = [after / before for before, after in zip(dense, finished, strict=True)]
  return {
    'dense': statistics.median(dense),
    'finished': statistics.median(finished),
    'ratio': statistics.median(ratios),
  }
