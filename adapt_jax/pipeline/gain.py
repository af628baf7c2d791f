"""What a run gains: size, KV cache and speed of the dense model and of the result, on this machine."""

import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.generation.generator import Generator
from adapt_jax.generation.in_turn import time_in_turn
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pruning import budget as budgets
from adapt_jax.reports.report import CostReport, GainReport

_PROMPT, _NEW, _REPEATS = 128, 16, 3  # tokens of the prompt and decoded after it; runs of each model
_LARGEST = 2 * 10**9  # parameters of a dense model whose speed is measured


def measured_gain(inputs: Inputs, config: ModelConfig, params: Params, dtype: Any) -> GainReport:
  """The costs of the dense model (`Inputs.reference`) and the result, both as written in `dtype`.

  Both models run in turn on random ids, since the time depends on shapes alone; medians of three runs. Speeds
  are left out in several processes and for dense models above two billion parameters. dtype: None for each
  tensor's own. Raises `Preempted`.
  """
  dense = inputs.reference
  stored = jnp.dtype(dtype or params['embed'].dtype)
  gain: GainReport = {
    'dense': _sizes(dense.config, dense.abstract_params(None), dtype, stored),
    'result': _sizes(config, params, dtype, stored),
    'dtype': stored.name,
  }
  if jax.process_count() > 1 or count_params(dense.config) > _LARGEST:
    return gain
  room = min(config.max_position, dense.config.max_position)
  prompt, new = min(_PROMPT, room // 2), min(_NEW, room - room // 2 - 1)
  ids = np.random.default_rng(0).integers(min(config.vocab_size, dense.config.vocab_size), size=prompt)
  result = jax.tree.map(lambda x: x.astype(inputs.dtype), params)
  models = ((dense.config, dense.load_params(inputs.dtype)), (config, result))
  generators = [Generator(*model, compiler=Compiler(), dtype=inputs.dtype) for model in models]
  timings = time_in_turn(generators, [ids.tolist()], new + 1, _REPEATS, 'speed')
  for costs, runs in zip((gain['dense'], gain['result']), timings, strict=True):
    costs['prefill'] = statistics.median(run.prefill_rate for run in runs)
    costs['decode'] = statistics.median(run.decode_rate for run in runs)
  devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  gain['measured'] = (
    f'Speeds: in adapt-jax on {devices} in {jnp.dtype(inputs.dtype).name}, one prompt of {prompt} tokens and '
    f'{new} more; medians of {_REPEATS} runs, in turn.'
  )
  return gain


def _sizes(config: ModelConfig, params: Params, dtype: Any, stored: np.dtype[Any]) -> CostReport:
  """Bytes; `params` may be `jax.ShapeDtypeStruct`."""
  leaves = jax.tree.leaves(params)
  cache = budgets.kv_cache(config, stored.itemsize)
  return {
    'weights': sum(math.prod(x.shape) * jnp.dtype(dtype or x.dtype).itemsize for x in leaves),
    'kv_cache': int(cache.number(cache.dense)),
  }
