"""Every program that is compiled also lowers for GPUs and TPUs, which needs none of their packages.

The library prunes, trains, measures and generates here; what it compiles is lowered before. Programs are
lowered for one of both, long rows, where attention differs, for both. make test-accelerators compiles the
programs of a run.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adapt_jax as aj
from adapt_jax.generation.generator import Generator
from adapt_jax.generation.sampling import Sampling
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import made_for
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.training.step import TrainingStep
from adapt_jax.training.teacher_cache import likeliest
from tests.programs.test_sharding import SHAPES, make_model, tokens_of, train_options

LONG = 130
# With the compute capability of an H100.
PLATFORMS = {'cuda': (9, 0), 'tpu': (0, 0)}


def lower(fn, *args, platforms=('cuda',)):
  """The program's text for each platform; raises if it cannot be written for one."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  texts = {}
  for platform in platforms:
    with made_for(platform, PLATFORMS[platform]):
      traced = jax.jit(lambda *args: fn(*args)).trace(*shapes)
      texts[platform] = traced.lower(lowering_platforms=(platform,)).as_text()
    assert 'LayoutConstraint' not in texts[platform]  # the form of products for CPUs
  return texts


@pytest.fixture
def lowered(monkeypatch):
  """The names of all programs that are compiled, each of which is lowered first."""
  names, compile_ = set(), Compiler.__call__

  def call(self, name, fn, *args, **options):
    lower(fn, *args)
    names.add(name)
    return compile_(self, name, fn, *args, **options)

  monkeypatch.setattr(Compiler, '__call__', call)
  return names


@pytest.fixture(scope='module')
def model():
  config, params = make_model()
  return aj.Model(config, params)


@pytest.mark.parametrize('method,compensate', [('obs', 'least_squares'), ('adapt', 'none'), ('flap', 'bias')])
def test_pruning(method, compensate, model, lowered):
  aj.prune(model, tokens_of(model.config), target=0.9, method=method, compensate=compensate, heal=0)
  expected = {'compensation'} if compensate != 'none' else set()
  assert expected <= lowered and lowered - {'compensation'}


def test_narrowing(model, lowered):
  aj.narrow(model, tokens_of(model.config), hidden_size=model.config.hidden_size - 8)
  assert lowered == {'narrowing'}


def test_training(model, lowered):
  rows = tokens_of(model.config)
  aj.recover(model, rows, teacher=model, batch=4, micro_batch=2, tokens=rows[:4].size)
  assert lowered == {'training'}


def test_a_teacher_whose_ids_are_kept(model):
  options = train_options(distill={'alpha': 1.0, 'cache': 8})
  rows = tokens_of(model.config)
  lower(likeliest(model.config, options, 'bfloat16'), model.params, rows, rows)


def test_perplexity_and_generation(model, lowered):
  aj.perplexity(model, tokens_of(model.config))
  generator = Generator(model.config, model.params, compiler=Compiler(), dtype='float32')
  generator.generate([[1, 2, 3], [4, 5]], 4, Sampling(0.7, 5, 0.9), frozenset(), 0)
  assert {'prefill', 'decode'} < lowered and len(lowered) == 3


def of_scoring(importance):
  def make(config, params, rows):
    stacked = jax.eval_shape(lambda x: surgery.stack(x, PrunePlan.dense(config), jnp.bfloat16), params)
    return Scorer(config, importance, 'cosine', 4, jnp.bfloat16), stacked, rows

  return make


def of_training(config, params, rows, layout='packed'):
  options, tx = train_options(batch=4, micro_batch=2, length=LONG, layout=layout), optax.adam(1e-3)
  state = {'params': params, 'optimizer': jax.eval_shape(tx.init, params)}
  return TrainingStep(config, options, tx, jnp.bfloat16), state, (rows, np.ones(rows.shape, bool), rows)


def of_documents(config, params, rows):
  return of_training(config, params, rows, 'padded')


def windows(*tokens):
  return {'layers': tuple(dataclasses.replace(SHAPES[0], window=window) for window in tokens)}


@pytest.mark.parametrize(
  'make,changes',
  [
    (of_scoring('taylor_second'), {}),
    (of_scoring('curvature'), {}),
    (of_scoring('curvature'), windows(0, LONG)),  # no row is longer
    (of_training, {}),
    (of_training, windows(0, 40)),
    (of_documents, windows(0, 40) | {'head_dim': 256}),  # a Gemma: cuDNN has no room for segments
  ],
  ids=['rows', 'sums', 'wide', 'training', 'windows', 'gemma'],
)
def test_attention_of_long_rows_is_fused(make, changes):
  """Under scans, vmap and checkpoints, in bfloat16: kernels of both passes, and no logits of whole rows."""
  config = dataclasses.replace(make_model(layers=SHAPES[:1])[0], **changes)
  args = make(config, llama.abstract_params(config), tokens_of(config, rows=4, length=LONG))
  texts = lower(*args, platforms=tuple(PLATFORMS))
  cudnn = {'__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'}
  assert set(re.findall(r'__cudnn\$\w+', texts['cuda'])) == cudnn
  assert set(re.findall(r'splash_mha_(fwd|dq|dkv)', texts['tpu'])) == {'fwd', 'dq', 'dkv'}
  for text in texts.values():
    assert f'{LONG}x{LONG}x' not in text
