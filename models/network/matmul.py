"""Products of flattened tokens with weights, and batched products, forward and backward, in the form that
each platform runs fastest.

Sums are computed in fp32 for any dtype of the factors, and the gradient of a weight is returned directly in
the weight's dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from adapt_jax.models.network.backend import on_cpu

# Up to so many rows, Eigen multiplies faster with the weight as the left factor, twice as fast for 4 to 16.
_FEW = 48
# Checkpoint name of every product's result, for rematerialisation policies.
PRODUCT = 'product'


def dot(a_RC: jax.Array, b: jax.Array, axis: int, dtype: Any = jnp.float32) -> jax.Array:
  """Product that sums over a's columns and `axis` of b, in `dtype`.

  XLA's CPU backend has fast bfloat16 kernels (AVX-512 BF16, AMX) only for an fp32 result. For a transposed
  left factor it has none, and only a slow one for fp32. So the result is rounded afterwards, and transposes
  before and after are separate copies.
  """
  if is_single_row(a_RC):
    # XLA fuses the conversion of b into this form, with b transposed, and reads b once, in memory order; the
    # bfloat16 kernels, which are fast for more rows, are twenty times slower for one.
    b32 = b.astype(jnp.float32)
    return (a_RC.astype(jnp.float32) @ (b32.T if axis else b32)).astype(dtype)
  if axis == 1 and 1 < len(a_RC) <= _FEW and on_cpu() and a_RC.dtype == b.dtype == jnp.float32:
    # Row-major, or XLA would turn it into the other form again.
    return _row_major(jax.lax.dot_general(b, a_RC, (((1,), (1,)), ((), ())))).T.astype(dtype)
  return _dot_general(a_RC, b, (((1,), (axis,)), ((), ())), dtype)


def _dot_general(a: jax.Array, b: jax.Array, axes: Any, dtype: Any) -> jax.Array:
  if not on_cpu():
    return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype)
  out = jax.lax.dot_general(_row_major(a), b, axes, preferred_element_type=jnp.float32)
  return _row_major(out).astype(dtype)


def is_single_row(x_RC: jax.Array) -> bool:
  """Whether x is one row of lower precision than fp32 on a CPU, which `dot` computes in a special way."""
  return len(x_RC) == 1 and x_RC.dtype != jnp.float32 and on_cpu()


def _row_major(x: jax.Array) -> jax.Array:
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_vjp
def product(x_TI: jax.Array, weight_OI: jax.Array) -> jax.Array:
  """x wᵀ, [T, O] in x's dtype; the weight is cast to that first."""
  return dot(x_TI, weight_OI.astype(x_TI.dtype), 1, x_TI.dtype)


def _forward(x_TI: jax.Array, weight_OI: jax.Array) -> tuple[jax.Array, Any]:
  return checkpoint_name(product(x_TI, weight_OI), PRODUCT), (x_TI, weight_OI)


def _backward(residuals: Any, g_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_TI, weight_OI = residuals
  x_gradient = dot(g_TO, weight_OI.astype(g_TO.dtype), 0, x_TI.dtype)
  return x_gradient, dot(g_TO.T, x_TI, 0, weight_OI.dtype)


product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def batch_product(a_BKRC: jax.Array, b: jax.Array, axis: int, dtype: Any = jnp.float32) -> jax.Array:
  """Batched product over B and K that sums over C: [B, K, R, S] in `dtype`.

  b is [B, K, S, C] with axis = -1, [B, K, C, S] with axis = -2. Gradients are rounded to a's dtype before
  they are multiplied.
  """
  return _batch_dot(a_BKRC, b, axis, dtype)


def _batch_dot(a_BKRC: jax.Array, b: jax.Array, axis: int, dtype: Any) -> jax.Array:
  # XLA's CPU backend would fold a transpose of b into the product, and then compute it in fp32.
  b = _row_major(b) if on_cpu() else b
  return _dot_general(a_BKRC, b, (((3,), (axis % 4,)), ((0, 1), (0, 1))), dtype)


def _batch_forward(a_BKRC: jax.Array, b: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, Any]:
  return _batch_dot(a_BKRC, b, axis, dtype), (a_BKRC, b)


def _batch_backward(axis: int, _: Any, residuals: Any, g_BKRS: jax.Array) -> tuple[jax.Array, jax.Array]:
  a, b = residuals
  g = g_BKRS.astype(a.dtype)
  other = -1 if axis == -2 else -2
  a_gradient = _batch_dot(g, b, other, a.dtype)
  # In attention, one of a and g holds logits, with a column for each key; the other is as narrow as a head.
  # The narrow one is transposed for the product, and then the result.
  narrow, wide = (a, g) if axis == -1 else (g, a)
  return a_gradient, _batch_dot(narrow.swapaxes(2, 3), wide, -2, b.dtype).swapaxes(2, 3)


batch_product.defvjp(_batch_forward, _batch_backward)


def products_by_shard(x_TC: jax.Array, y_TD: jax.Array, shards: int, dtype: Any = jnp.float32) -> jax.Array:
  """Σ of x yᵀ over the tokens of each shard, [shards, C, D] in `dtype`.

  x, which is transposed for it, should be the smaller factor.
  """
  if shards == 1:
    return dot(x_TC.T, y_TD, 0, dtype)[None]
  x_R1TC, y_R1TD = (x.reshape(shards, 1, -1, x.shape[1]) for x in (x_TC, y_TD))
  return batch_product(x_R1TC.swapaxes(2, 3), y_R1TD, -2, dtype)[:, 0]
