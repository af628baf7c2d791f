"""Builds the programs of pruning and their arguments from a run's options, for runs and estimates."""

from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.config.prune_options import CalibrationOptions, PruneOptions
from adapt_jax.machine.mesh import rows_at_once
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.sharding import row_sharding
from adapt_jax.pruning.attention_units import AttentionUnit
from adapt_jax.pruning.compensate import Compensator
from adapt_jax.pruning.criteria import Importance, find_importance
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.methods.base import Method
from adapt_jax.pruning.scorer import Scorer


def scoring(
  config: ModelConfig,
  options: PruneOptions,
  dtype: Any,
  unit: AttentionUnit,
  method: type[Method] | None = None,
) -> Scorer:
  """The program that scores groups and layers for the method; `method` overrides the one in `options`."""
  found = method or METHODS[options.method]
  return Scorer(
    config,
    found.importance or options.importance,
    found.distance or options.layer_distance,
    micro_batch(options.calibration),
    dtype,
    unit=unit,
  )


def importance(options: PruneOptions) -> Importance:
  """The importance that is used: the method's own, or the one in `options`."""
  return find_importance(METHODS[options.method].importance or options.importance)


def compensation(config: ModelConfig, options: PruneOptions, dtype: Any, unit: AttentionUnit) -> Compensator:
  """The program that adjusts the remaining weights; for prune.compensate other than none."""
  return Compensator(config, options.compensate, micro_batch(options.calibration), dtype, unit)


def calibration_tokens(options: CalibrationOptions) -> jax.ShapeDtypeStruct:
  """Shape, dtype and sharding of the tokens [samples, length] that both programs take."""
  shape = (options.samples, options.length)
  return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding())


def micro_batch(options: CalibrationOptions) -> int:
  """Rows that a layer processes at once, over all devices."""
  return rows_at_once(options.samples, options.batch)
