"""The budget of a run (what `prune.target` limits) from its options and its model."""

import dataclasses

import jax.numpy as jnp

from adapt_jax.config.options import RunOptions
from adapt_jax.models.config import ModelConfig
from adapt_jax.pipeline.dense_model import with_output_bias
from adapt_jax.pruning import budget as budgets
from adapt_jax.pruning import file_size, latency
from adapt_jax.pruning.attention_units import find_unit
from adapt_jax.pruning.budget import Budget


def budget_of(options: RunOptions, config: ModelConfig, stored: str = 'bfloat16') -> Budget:
  """What prune.target limits in a run on this model.

  Args:
    config: of the source. Biases that the run adds to it count, but not before it is pruned.
    stored: dtype of the source's weights, which the export keeps if export.dtype is auto; by default that of
      most models, for estimates without weights.

  Raises InputError for a bad or foreign prune.latency_table.
  """
  biased = with_output_bias(config, options.prune.compensate == 'bias')
  dense = _budget(options, config, stored).dense
  return dataclasses.replace(_budget(options, biased, stored), dense=dense)


def _budget(options: RunOptions, config: ModelConfig, stored: str) -> Budget:
  limit, request = options.prune.limit, options.bench
  context = request.prompt_length + request.new_tokens
  itemsize = jnp.dtype(stored if options.export.dtype == 'auto' else options.export.dtype).itemsize
  unit = find_unit(options.prune, config)
  if limit.kind == 'flops':
    return budgets.flops(config, context, unit)
  if limit.kind == 'kv_cache':
    return budgets.kv_cache(config, itemsize)
  if limit.kind == 'file':
    return file_size.gguf(config, limit.type, unit) if limit.type else file_size.hf(config, itemsize, unit)
  if limit.kind == 'memory':
    return budgets.memory(config, itemsize, request.batch * context, unit)
  if limit.timed:
    auto = options.prune.attention == 'auto'
    table = latency.find_table(options.prune.latency_table, config, request, unit, auto)
    return latency.budget(table, config, limit.kind)
  return budgets.params(config, unit)
