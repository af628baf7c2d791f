"""The training step: what it weighs, and in which dtype it keeps its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_jax.config import DistillOptions, TrainOptions
from adapt_jax.train import make_step
from configs import base
from models import llama
from models.config import LayerShape, ModelConfig, RopeConfig

CONFIG = ModelConfig(
  'llama', 61, 32, 8, (LayerShape(6, 3, 40), LayerShape(4, 2, 24)), RopeConfig(1e4), 1e-5, True
)


def options(**kw):
  values = base.get_config().train.to_dict() | {'batch': 4, 'micro_batch': 4, 'length': 12} | kw
  distill = values.pop('distill')
  return TrainOptions(
    **values, distill=distill if isinstance(distill, DistillOptions) else DistillOptions(**distill)
  )


@pytest.fixture(scope='module')
def params():
  return jax.jit(lambda: jax.tree.map(lambda x: 3 * x, llama.init_params(CONFIG, jax.random.key(0))))()


def batch():
  """Four rows with very different numbers of targets, one with none."""
  rng = np.random.default_rng(0)
  targets = rng.random((4, 12)) < np.array([[0.1], [0.9], [0.5], [0.0]])
  targets[:, 0] = False
  return rng.integers(0, 61, (4, 12)).astype(np.int32), targets


def gradient_of(params, opts, dtype=jnp.float32, teacher=None):
  """What one step of plain gradient descent at rate 1 takes away, and the loss."""
  tx = optax.sgd(1.0)
  state = {'params': params, 'optimizer': tx.init(params)}
  step = jax.jit(make_step(CONFIG, opts, tx, dtype, CONFIG if teacher else None))
  new, metrics = step(state, *batch(), *([teacher] if teacher else []))
  return jax.tree.map(lambda a, b: np.asarray(a - b), params, new['params']), metrics, new


def plain_loss(params):
  tokens, targets = batch()
  logp = jax.nn.log_softmax(llama.apply(CONFIG, params, tokens)[:, :-1])
  picked = jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
  return -(picked * targets[:, 1:]).sum() / targets[:, 1:].sum()


@pytest.mark.parametrize('micro_batch,remat', [(4, False), (2, False), (1, True)])
def test_the_gradient_is_that_of_the_mean_over_all_targets(params, micro_batch, remat):
  """However the batch is cut, each target weighs the same; tied embeddings get both their gradients."""
  loss, expected = jax.jit(jax.value_and_grad(plain_loss))(params)
  ours, metrics, _ = gradient_of(params, options(micro_batch=micro_batch, remat=remat))
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(expected), rtol=1e-4)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_computes_in_bfloat16_on_fp32_masters(params):
  exact, _, _ = gradient_of(params, options())
  rough, _, new = gradient_of(params, options(), jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(new['params'])} == {np.dtype(np.float32)}
  a, b = exact['layers'][0]['mlp']['gate'], rough['layers'][0]['mlp']['gate']
  error = np.linalg.norm(a - b) / np.linalg.norm(a)
  assert 1e-4 < error < 0.1  # rounded products, not fp32 ones, and not noise
  step = jax.jit(make_step(CONFIG, options(), optax.sgd(1.0), jnp.bfloat16))
  state = {'params': params, 'optimizer': optax.sgd(1.0).init(params)}
  assert 'bf16' in step.lower(state, *batch()).as_text()


def test_distillation_pulls_towards_the_teacher(params):
  teacher = jax.tree.map(lambda x: x * 1.1, params)
  only = options(distill=DistillOptions(1.0, 2.0))
  same, metrics, _ = gradient_of(params, only, teacher=params)
  np.testing.assert_allclose(metrics['loss'], 0, atol=1e-5)
  assert max(np.abs(x).max() for x in jax.tree.leaves(same)) < 1e-4
  _, far, _ = gradient_of(params, only, teacher=teacher)
  _, half, _ = gradient_of(params, options(distill=DistillOptions(0.5, 2.0)), teacher=teacher)
  _, plain, _ = gradient_of(params, options())
  assert far['loss'] > 1e-3
  np.testing.assert_allclose(half['loss'], (far['loss'] + plain['loss']) / 2, rtol=1e-4)
