"""Second moments and symmetric positive definite systems, summed and solved in fp32 on every platform."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.models.errors import InputError
from adapt_jax.models.network.backend import on_tpu
from adapt_jax.models.network.matmul import products_by_shard
from adapt_jax.models.network.sharding import constrain, token_shards

_BLOCK = 512  # of a matrix that a TPU inverts block by block
_OWN_SHARE = 1e-4  # of each diagonal entry that damping adds


def check_finite(arrays: Any, what: str) -> None:
  """Raises InputError, naming `what`, if any number of a tree of arrays is not finite."""
  if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(arrays)):
    raise InputError(f'{what} not finite: check the model, the calibration text and model.dtype')


def exact() -> contextlib.AbstractContextManager[Any]:
  """Products traced inside are in fp32; by default GPUs round the factors to TF32 and TPUs to bfloat16."""
  return jax.default_matmul_precision('highest')


def own_products(x_TC: jax.Array, y_TD: jax.Array) -> jax.Array:
  """Σ of x yᵀ over the tokens of each shard, [shards, C, D], in fp32.

  A loop adds these up without sending anything over the axes that split tokens (see `token_shards`); `total`
  adds the shards. A `tensor` axis splits D. Tokens are rows first. Factors in bfloat16 are not converted:
  fp32 holds their products exactly, and hardware for bfloat16 is twice to fifteen times as fast.
  """
  shards = token_shards(len(x_TC))
  if x_TC.dtype == y_TD.dtype == jnp.bfloat16:
    return constrain(products_by_shard(x_TC, y_TD, shards), 'B.F')
  x_RTC, y_RTD = (x.reshape(shards, -1, x.shape[-1]).astype(jnp.float32) for x in (x_TC, y_TD))
  with exact():
    return constrain(jnp.einsum('rtc,rtd->rcd', x_RTC, y_RTD), 'B.F')


def no_products(tokens: int, columns: int, others: int) -> jax.Array:
  """Zeros to which a loop adds `own_products` of that many tokens."""
  return constrain(jnp.zeros((token_shards(tokens), columns, others)), 'B.F')


def total(own_RCD: jax.Array) -> jax.Array:
  """Σ over all shards, [C, D], for which the devices communicate; split over `fsdp` and `tensor`."""
  return constrain(own_RCD.sum(0), 'DF')


def damped(matrix_CC: jax.Array, damping: float | jax.Array) -> jax.Array:
  """Adds damping · (median of the positive diagonal entries), and a little of each entry, to the diagonal.

  The median, because the massive activations of a few channels at a text's first token (Sun et al., arXiv
  2402.17762) can raise the mean far above it. The share of each entry keeps the matrix invertible in fp32
  where such channels are massive together.
  """
  diagonal_C = jnp.diagonal(matrix_CC)
  median = jnp.nan_to_num(jnp.nanmedian(jnp.where(diagonal_C > 0, diagonal_C, jnp.nan)))
  return matrix_CC + jnp.diag(jnp.maximum(damping * median, 1e-30) + _OWN_SHARE * diagonal_C)


def inverse(matrix_CC: jax.Array) -> jax.Array:
  """The inverse of a symmetric positive definite matrix, computed whole on every device."""
  if on_tpu() and len(matrix_CC) > _BLOCK:
    return swept_inverse(matrix_CC, _BLOCK)
  return _cholesky_solve(*(constrain(x, '..') for x in (matrix_CC, jnp.eye(len(matrix_CC)))))


def solve(matrix_CC: jax.Array, right_CD: jax.Array) -> jax.Array:
  """x [C, D] of matrix x = right, for a symmetric positive definite matrix."""
  if on_tpu() and len(matrix_CC) > _BLOCK:
    with exact():
      return swept_inverse(matrix_CC, _BLOCK) @ right_CD
  return _cholesky_solve(matrix_CC, right_CD)


def _cholesky_solve(matrix_CC: jax.Array, right_CD: jax.Array) -> jax.Array:
  return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix_CC), right_CD)


def swept_inverse(matrix_CC: jax.Array, block: int) -> jax.Array:
  """The inverse of a symmetric positive definite matrix, by the sweep operator on one block after another.

  (Goodnight, The American Statistician 1979.) XLA writes a Cholesky factorisation for TPUs as straight code
  that grows with the square of the size: 2,048 columns compile for 14 seconds, 14,336 for a quarter of an
  hour, and triangular solves for longer. This is one loop. All of it is whole on every device: a matrix split
  over devices would be gathered in every round.
  """
  size = len(matrix_CC)
  missing = -size % block
  matrix_CC = constrain(matrix_CC, '..')
  padded = jnp.pad(matrix_CC, (0, missing)) + jnp.diag(jnp.arange(size + missing) >= size)

  def sweep(k: jax.Array, matrix_CC: jax.Array) -> jax.Array:
    start = k * block
    rows_BC = jax.lax.dynamic_slice_in_dim(matrix_CC, start, block)
    pivot_BB = jax.lax.dynamic_slice_in_dim(rows_BC, start, block, axis=1)
    inverse_BB = _cholesky_solve(pivot_BB, jnp.eye(block))
    new_BC = constrain(inverse_BB @ rows_BC, '..')
    matrix_CC = constrain(matrix_CC - rows_BC.T @ new_BC, '..')
    new_BC = jax.lax.dynamic_update_slice_in_dim(new_BC, -inverse_BB, start, axis=1)
    matrix_CC = jax.lax.dynamic_update_slice_in_dim(matrix_CC, new_BC, start, axis=0)
    return constrain(jax.lax.dynamic_update_slice_in_dim(matrix_CC, new_BC.T, start, axis=1), '..')

  with exact():
    swept_CC = jax.lax.fori_loop(0, len(padded) // block, sweep, padded)
  return constrain(-swept_CC[:size, :size], '..')
