"""Schedules and the split of the data over stages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import DistillOptions, TrainOptions
from adapt_jax.configs import base
from adapt_jax.models.errors import InputError
from adapt_jax.pipeline.schedule import stage_steps
from adapt_jax.training.optim import learning_rate, optimizer
from adapt_jax.training.rate import SHARE, root_mean_square, with_rate
from tests.support.helpers import random_params, tiny_config


def options(**kw):
  values = base.get_config().train.to_dict()
  values |= {'tokens': 100 * 8, 'batch': 2, 'micro_batch': 2, 'length': 4, 'lr': 1e-2, 'min_lr': 1e-3}
  distill = DistillOptions(**values.pop('distill'))
  return TrainOptions(**values | {'distill': distill} | kw)


def test_wsd_warms_up_holds_and_decays():
  rate = learning_rate(options(), 100)
  values = np.array([rate(s) for s in range(101)])
  np.testing.assert_allclose(values[:5], 1e-2 * np.arange(1, 6) / 5, rtol=1e-5)
  np.testing.assert_allclose(values[5:90], 1e-2, rtol=1e-6)
  np.testing.assert_allclose(values[90:100], np.linspace(1e-2, 1e-3, 11)[1:], rtol=1e-4)


def test_cosine_ends_at_min_lr():
  rate = learning_rate(options(schedule='cosine'), 100)
  np.testing.assert_allclose(rate(99), 1e-3, rtol=1e-4)
  np.testing.assert_allclose(rate(5), 1e-2, rtol=1e-5)
  half = 5 + 95 // 2
  expected = 1e-3 + (1e-2 - 1e-3) * (1 + np.cos(np.pi * 47 / 94)) / 2
  np.testing.assert_allclose(rate(half), expected, rtol=1e-4)


@pytest.mark.parametrize('steps', [1, 2, 3, 10])
def test_short_runs_have_positive_rates(steps):
  rate = learning_rate(options(), steps)
  assert all(1e-3 <= rate(s) <= 1.001e-2 for s in range(steps))
  last = 1e-3 if steps > 1 else 1e-2
  np.testing.assert_allclose(rate(steps - 1), last, rtol=1e-4)


@pytest.mark.parametrize('warmup,last', [(0.95, 1e-3), (1.0, 1e-2)])
def test_the_decay_follows_a_long_warm_up(warmup, last):
  rate = learning_rate(options(warmup=warmup), 100)
  np.testing.assert_allclose(rate(99), last, rtol=1e-4)
  np.testing.assert_allclose(rate(94), 1e-2 * min(1, 95 / (100 * warmup)), rtol=1e-4)


def test_shares_of_the_stages():
  assert stage_steps(options(), 4) == [10, 30, 60, 100]


def test_moments_in_bfloat16_follow_the_gradients():
  """Also when these fall to a tenth: at a decay of 0.999 rounding would freeze the second."""
  gradients = np.random.default_rng(0).normal(size=(200, 50)).astype(np.float32)
  gradients[100:] /= 10
  params = {'w': jnp.zeros(50)}
  tx = optimizer(options(moments_dtype='bfloat16', clip=1e9), 1000)
  exact = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)
  state, expected, found = tx.init(params), exact.init(params), []
  for i, g in enumerate(gradients):
    updates, state = tx.update({'w': jnp.asarray(g)}, state, params)
    direction, expected = exact.update({'w': jnp.asarray(g)}, expected)
    rate = learning_rate(options(), 1000)(i)
    found.append((np.asarray(updates['w']) / -rate, np.asarray(direction['w'])))
  assert {x['w'].dtype for x in (state[1].mu, state[1].nu)} == {jnp.dtype('bfloat16')}
  ours, theirs = np.array(found).swapaxes(0, 1)
  assert 0 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 10 * 2**-8


def test_no_weight_decay():
  tx = optimizer(options(), 100)
  params = {'w': jnp.full(3, 100.0)}
  updates, _ = tx.update({'w': jnp.zeros(3)}, tx.init(params), params)
  np.testing.assert_array_equal(updates['w'], 0)


def test_the_rate_follows_from_the_weights():
  config = tiny_config('llama')
  params = random_params(config)
  middle = params['layers'][2]
  matrices = [middle['attention'][name] for name in 'qkvo'] + list(middle['mlp'].values())
  flat = np.concatenate([np.ravel(x) for x in matrices]).astype(np.float64)
  assert root_mean_square(params) == pytest.approx(np.sqrt(np.mean(flat**2)), rel=1e-6)

  def rate(scale=1.0, **fields):
    given = {'lr': -1.0, 'min_lr': -1.0, 'batch': 4, 'length': 512} | fields
    return with_rate(options(**given), jax.tree.map(lambda x: scale * x, params))

  base = rate()
  assert base.lr == pytest.approx(SHARE * np.sqrt(np.mean(flat**2)), rel=0.05)
  assert base.lr == float(f'{base.lr:.1e}') and base.min_lr == base.lr / 10
  assert rate(0.125).lr == pytest.approx(base.lr / 8, rel=0.1)
  assert rate(batch=16).lr == pytest.approx(2 * base.lr, rel=0.1)
  assert rate(batch=1024).lr == rate(batch=64).lr == pytest.approx(4 * base.lr, rel=0.1)
  assert rate(lr=1e-3).lr == 1e-3 and rate(lr=1e-3).min_lr == 1e-4 and rate(lr=1e-3, min_lr=0.0).min_lr == 0
  assert rate(0.125, lr=1e-3).lr == 1e-3
  with pytest.raises(InputError, match='min_lr = 0.01 is above the learning rate .* from the weights'):
    rate(min_lr=1e-2)


def test_a_rate_that_is_still_open_trains_nothing():
  with pytest.raises(ValueError, match='no learning rate yet'):
    optimizer(options(lr=-1.0), 10)


def test_a_negative_rate_is_refused():
  with pytest.raises(InputError, match='train.min_lr = -0.5'):
    from_dict({'train': {'min_lr': -0.5}})
