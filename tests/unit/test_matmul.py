"""Products with weights: values, gradients, and that they run in bfloat16 whatever surrounds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.network.backend import made_for
from adapt_jax.models.network.matmul import batch_product, dot, product
from tests.support.helpers import factors

TOLERANCE = {'float32': 1e-5, 'bfloat16': 2e-2}


def arrays(dtype, tokens=12, inputs=32, outputs=61):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (tokens, inputs), (outputs, inputs), (tokens, outputs)
  x, w, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
  return x.astype(dtype), w, g.astype(dtype)


@pytest.mark.parametrize('tokens', [12, 60])  # the form depends on the number of rows
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_values_and_gradients(dtype, tokens):
  x, w, g = arrays(dtype, tokens)
  y, pull = jax.vjp(product, x, w)
  dx, dw = pull(g)
  assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, w.dtype)
  x32, w32, g32 = (np.asarray(a, np.float32) for a in (x, w.astype(dtype), g))
  for ours, plain in ((y, x32 @ w32.T), (dx, g32 @ w32), (dw, g32.T @ x32)):
    error = np.linalg.norm(np.asarray(ours, np.float32) - plain) / np.linalg.norm(plain)
    assert error < TOLERANCE[dtype]


def test_few_rows_in_float32_multiply_with_the_weight_on_the_left():
  """So that decoding several rows is 1.5 times as fast; XLA must not turn the product around."""
  x, w, _ = arrays('float32')
  (line,) = (x for x in jax.jit(product).lower(x, w).compile().as_text().splitlines() if ' dot(' in x)
  assert 'f32[61,12]' in line.partition(' dot(')[0]


def test_a_weights_gradient_is_not_rounded_to_the_activations_dtype():
  x, w, g = arrays('bfloat16')
  dw = jax.vjp(product, x, w)[1](g)[1]
  exact = np.asarray(g, np.float32).T @ np.asarray(x, np.float32)
  assert np.linalg.norm(dw - exact) / np.linalg.norm(exact) < 1e-6  # rounded it would be 2e-3


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_transposes_around_a_product(dtype):
  """XLA's CPU backend would fold them into it, and then could not run it in bfloat16."""
  x, _, g = arrays(dtype)

  @jax.jit
  def run(x, g):
    return dot(jnp.where(g.T > 0, g.T, 0), x, 0), dot(x.T, g, 0).T

  x32, g32 = (np.asarray(v, np.float32) for v in (x, g))
  for ours, plain in zip(run(x, g), (np.maximum(g32, 0).T @ x32, g32.T @ x32), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_one_product_for_each_of_many_samples():
  x, w, g = arrays('float32')
  each = jax.vmap(lambda x, g: jax.vjp(product, x[None], w)[1](g[None])[1])(x, g)
  np.testing.assert_allclose(each, np.einsum('to,ti->toi', g, x), rtol=1e-5)


@pytest.mark.parametrize(
  ('dtype', 'axis', 'platform'),
  [('float32', -1, 'cpu'), ('bfloat16', -1, 'cpu'), ('bfloat16', -2, 'cpu'), ('bfloat16', -1, 'gpu')],
)
def test_batches_of_products_and_their_gradients(dtype, axis, platform):
  """Of fp32 results in bfloat16 too: no product of the backward pass takes fp32 factors."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (2, 3, 16, 24), (2, 3, 20, 24) if axis == -1 else (2, 3, 24, 20), (2, 3, 16, 20)
  a, b, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
  a, b = a.astype(dtype), b.astype(dtype)

  def run(a, b, g):
    y, pull = jax.vjp(lambda a, b: batch_product(a, b, axis), a, b)
    return y, batch_product(a, b, axis, a.dtype), *pull(g)

  with made_for(platform):
    lowered = jax.jit(run).lower(a, b, g)
  y, rounded, da, db = lowered.compile()(a, b, g)
  assert (y.dtype, rounded.dtype, da.dtype, db.dtype) == (jnp.float32, dtype, dtype, dtype)
  form = 'bkrc,bksc->bkrs' if axis == -1 else 'bkrc,bkcs->bkrs'
  plain, pull = jax.vjp(lambda a, b: jnp.einsum(form, a, b), *(x.astype(jnp.float32) for x in (a, b)))
  for ours, exact in ((y, plain), (rounded, plain), *zip((da, db), pull(g), strict=True)):
    assert np.linalg.norm(np.float32(ours) - exact) / np.linalg.norm(exact) < TOLERANCE[dtype]
  assert factors(lowered) == [[dtype] * 2] * 4


def test_a_batch_of_products_for_each_of_many_samples():
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (5, 1, 2, 8, 4), (5, 1, 2, 6, 4), (5, 1, 2, 8, 6)
  a, b, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
  da, db = jax.vmap(lambda a, b, g: jax.vjp(lambda a, b: batch_product(a, b, -1), a, b)[1](g))(a, b, g)
  np.testing.assert_allclose(da, g @ b, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(db, g.swapaxes(-1, -2) @ a, rtol=1e-4, atol=1e-5)
