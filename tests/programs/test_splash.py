"""TPUs' attention without a TPU: Pallas interprets its kernels on a CPU, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.configs import base
from adapt_jax.machine import mesh
from adapt_jax.models.network import attention, splash
from adapt_jax.models.network.backend import made_for
from adapt_jax.training.step import TrainingStep
from tests.programs.test_sharding import SHAPES, assert_close, make_model, put, set_mesh, tokens_of

ROWS = 2


@pytest.fixture
def tpu(monkeypatch):
  """Code is made for a TPU, its kernels are interpreted; the calls of splash attention."""
  calls = []
  whole = splash.splash_attention

  def interpreted(*args, **form):
    calls.append(args)
    return whole(*args, **form, interpret=True)

  monkeypatch.setattr(splash, 'splash_attention', interpreted)
  with made_for('tpu'):
    yield calls


def inputs(T, N, K, H, segmented):
  rng = np.random.default_rng(T)
  qkv = [rng.standard_normal((ROWS, T, heads, H)).astype(np.float32) for heads in (N, K, K)]
  return qkv, np.sort(rng.integers(0, 4, (ROWS, T)), axis=1).astype(np.int32) if segmented else None


@pytest.mark.parametrize(
  'T,N,K,H,segmented,cap,window',
  [(299, 4, 2, 80, True, 0.0, None), (299, 2, 1, 64, True, 2.0, 130), (512, 1, 1, 128, False, 0.0, 1)],
)
def test_agrees_with_the_plain_form(T, N, K, H, segmented, cap, window, tpu, monkeypatch):
  """Outputs and gradients: an odd number of tokens in three blocks, groups of heads, one large block.

  A window that begins within a block, and that of the token alone.
  """
  qkv, segments = inputs(T, N, K, H, segmented)
  form = attention.Logits(H**-0.5, cap)

  def run(*qkv):
    out = attention.causal_attention(*qkv, segments, form, window)
    return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

  def outputs():
    (_, out), gradients = jax.jit(jax.value_and_grad(lambda *x: run(*x), (0, 1, 2), has_aux=True))(*qkv)
    return out, *gradients

  found = outputs()
  assert len(tpu) == 1
  monkeypatch.setenv('ADAPT_JAX_FUSED_ATTENTION', '0')
  for a, b in zip(found, outputs(), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
  assert len(tpu) == 1


def train(config, params, batch, **fields):
  """Loss and gradient of one step, the change that SGD with rate 1 makes."""
  values = base.get_config()
  values.train.update({'batch': 8, 'micro_batch': 8, 'length': 130} | fields)
  tx = optax.sgd(1.0)
  state = {'params': params, 'optimizer': tx.init(params)}
  step = TrainingStep(config, from_dict(values.to_dict()).train, tx, jnp.float32)
  after, metrics = mesh.jit(step, state, batch)(state, batch)
  return metrics['loss'], jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, after['params'])


def test_training_on_a_mesh(tpu, monkeypatch):
  """Rows and heads split, micro-batches, remat, segments: as the plain form on one device without."""
  config, params = make_model(layers=SHAPES[:1])
  tokens = tokens_of(config, length=130)
  segments = np.sort(np.random.default_rng(0).integers(1, 4, tokens.shape), axis=1).astype(np.int32)
  arrays = tokens, np.ones(tokens.shape, bool), segments
  with set_mesh():
    batch = mesh.put_rows(np.arange(8), lambda ids: tuple(x[ids] for x in arrays))
    trained = train(config, put(params), batch, remat='True', micro_batch=2)
  assert tpu
  monkeypatch.setenv('ADAPT_JAX_FUSED_ATTENTION', '0')
  assert_close(trained, train(config, params, arrays), rtol=2e-4)


@pytest.mark.parametrize(
  'platform,T,rows,kv_heads,expected',
  [
    ('tpu', 128, 4, 2, True),
    ('tpu', 127, 4, 2, False),  # less than a block
    ('tpu', 1024, 3, 2, False),  # rows that the mesh does not divide
    ('tpu', 1024, 4, 3, False),  # and KV heads
    ('gpu', 1024, 4, 2, False),
  ],
)
def test_what_splash_attention_takes(platform, T, rows, kv_heads, expected):
  shapes = [jax.ShapeDtypeStruct((rows, T, heads, 64), jnp.bfloat16) for heads in (6, kv_heads, kv_heads)]
  with set_mesh(), made_for(platform):
    traced = jax.jit(lambda *qkv: attention.causal_attention(*qkv)).trace(*shapes)
  assert ('pallas_call' in str(traced.jaxpr)) is expected
