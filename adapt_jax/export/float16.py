"""The range of float16, which some weights exceed."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.hf_weights import Leaf, lookup
from adapt_jax.models.network.llama import Params


def check_range(params: Params, leaves: Sequence[Leaf], remedy: str) -> None:
  """Raises InputError, in every process, for a weight of these parameters that float16 cannot hold."""
  arrays = [lookup(params, leaf.path) for leaf in leaves]
  if all(isinstance(x, jax.Array) for x in arrays):
    largest = jax.jit(lambda arrays: [jnp.max(jnp.abs(x)) for x in arrays])(arrays)
  else:  # read from their files, one at a time
    largest = [np.abs(np.asarray(x)).max() for x in arrays]
  for leaf, found in zip(leaves, largest, strict=True):
    if float(found) > float(np.finfo(np.float16).max):
      raise InputError(f'tensor {leaf.name} has weights beyond the range of float16: {remedy}')
