"""The range of float16, which some weights exceed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.hf_weights import Leaf, leaves, lookup
from adapt_jax.models.network.llama import Params


def check_weights(config: ModelConfig, params: Params, dtype: Any) -> None:
  """Raises InputError, in every process, if `dtype` is float16 and cannot hold a weight of the model."""
  if dtype is not None and np.dtype(dtype) == np.float16:
    check_range(params, leaves(config), 'choose bfloat16 or float32 as export.dtype')


def check_range(params: Params, stored: Sequence[Leaf], remedy: str) -> None:
  """Raises InputError, in every process, for a weight of these parameters that float16 cannot hold."""
  arrays = [lookup(params, leaf.path) for leaf in stored]
  if all(isinstance(x, jax.Array) for x in arrays):
    largest = jax.jit(lambda arrays: [jnp.max(jnp.abs(x)) for x in arrays])(arrays)
  else:  # read from their files, one at a time
    largest = [np.abs(np.asarray(x)).max() for x in arrays]
  for leaf, found in zip(stored, largest, strict=True):
    if float(found) > float(np.finfo(np.float16).max):
      raise InputError(f'tensor {leaf.name} has weights beyond the range of float16: {remedy}')
