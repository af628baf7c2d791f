"""The training step: what it weighs, and in which dtype it keeps its state."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_jax.config.options import DistillOptions, TrainOptions
from adapt_jax.configs import base
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import bytes_of
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.network import llama
from adapt_jax.training import loop, remat
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep
from tests.support.helpers import KeepingCompiler, factors

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
  return rng.integers(0, 61, (4, 12)).astype(np.int32), targets, np.ones((4, 12), np.int32)


def gradient_of(params, opts, dtype=jnp.float32, teacher=None, rows=None):
  """What one step of plain gradient descent at rate 1 takes away, and the loss."""
  tx = optax.sgd(1.0)
  state = {'params': params, 'optimizer': tx.init(params)}
  step = jax.jit(TrainingStep(CONFIG, opts, tx, dtype, CONFIG if teacher else None))
  new, metrics = step(state, (rows or batch()), *([teacher] if teacher else []))
  return jax.tree.map(lambda a, b: np.asarray(a - b), params, new['params']), metrics, new


def test_bfloat16_computes_in_bfloat16_on_fp32_masters(params):
  exact, _, _ = gradient_of(params, options())
  rough, _, new = gradient_of(params, options(), jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(new['params'])} == {np.dtype(np.float32)}
  a, b = exact['layers'][0]['mlp']['gate'], rough['layers'][0]['mlp']['gate']
  error = np.linalg.norm(a - b) / np.linalg.norm(a)
  assert 1e-4 < error < 0.1  # rounded products, not fp32 ones, and not noise
  step = jax.jit(TrainingStep(CONFIG, options(), optax.sgd(1.0), jnp.bfloat16))
  state = {'params': params, 'optimizer': optax.sgd(1.0).init(params)}
  found = factors(step.lower(state, batch()))
  assert len(found) > 40 and found == [['bfloat16'] * 2] * len(found)  # attention's and the head's too


@pytest.mark.parametrize(
  'dtype,remat', [(jnp.float32, 'False'), (jnp.bfloat16, 'False'), (jnp.bfloat16, 'True')]
)
def test_planned_memory_holds_no_attention_weights_of_all_layers(dtype, remat):
  """Beside gradients and, in the backward pass, each layer's products: all else is of one layer at a time."""
  layers, rows, length = 12, 2, 256
  config = ModelConfig('llama', 64, 64, 16, (LayerShape(8, 4, 96),) * layers, RopeConfig(1e4), 1e-5, True)
  opts, tx = options(batch=rows, micro_batch=rows, length=length, remat=remat), optax.adam(1e-3)
  params = llama.abstract_params(config)
  state = {'params': params, 'optimizer': jax.eval_shape(tx.init, params)}
  shapes = tuple(jax.ShapeDtypeStruct((rows, length), t) for t in (jnp.int32, jnp.bool_, jnp.int32))
  step = TrainingStep(config, opts, tx, dtype)
  planned = Compiler()('training', step, state, shapes, donate_argnums=(0,)).memory_analysis()
  attention = 4 * rows * 8 * length**2  # bytes of a layer's, in fp32
  gradients = sum(4 * x.size for x in jax.tree.leaves(params))
  products = rows * length * (128 + 64 + 64 + 64 + 96 + 96 + 64) * jnp.dtype(dtype).itemsize
  kept = gradients + (64 * rows * length * 4 if remat == 'True' else products) * layers
  assert planned.temp_size_in_bytes < kept + 6 * attention  # of 12 layers' at least 12


def test_moments_in_bfloat16_save_their_bytes():
  """They are updated in place too: the whole step needs less by what they are smaller."""
  config = dataclasses.replace(CONFIG, layers=(LayerShape(6, 3, 400),) * 8)
  params = llama.abstract_params(config)

  def planned(moments):
    opts = options(moments_dtype=moments, lr=1e-4, min_lr=1e-5)
    tx = optimizer(opts, 10)
    state = {'params': params, 'optimizer': jax.eval_shape(tx.init, params)}
    step = TrainingStep(config, opts, tx, jnp.float32)
    plan = Compiler()('training', step, state, batch(), donate_argnums=(0,)).memory_analysis()
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes

  saved = planned('float32') - planned('bfloat16')
  assert saved > 3.9 * count_params(config)  # of 4 bytes


# Options, GB of the device, how much too small sizes by shapes are -> rows at once, remat, compiled forms.
FORMS = [
  ({}, 130, 1, 32, 'False', 1),
  ({}, 127, 1, 16, 'False', 1),
  ({}, 127, 0.5, 16, 'False', 2),
  ({}, 15, 1, 8, 'True', 2),  # rather than fewer than 4,096 tokens at once
  ({}, 0.5, 1, 1, 'True', 2),  # does not fit: the smallest
  ({}, 3, 0.1, 2, 'True', 5),
  ({'remat': 'False'}, 15, 1, 2, 'False', 1),
  ({'remat': 'True'}, 15, 1, 8, 'True', 1),
  ({'micro_batch': 8}, 31, 0.1, 8, 'True', 2),
  ({'micro_batch': 8, 'remat': 'False'}, 1, 1, 8, 'False', 1),
  ({'batch': 60}, 130, 1, 30, 'False', 1),
  ({'batch': 60}, 20, 1, 15, 'True', 2),
  ({'length': 128}, 64, 1, 64, 'True', 2),
  ({'length': 65_536}, 100, 1, 1, 'False', 1),
  ({}, 0, 1, 8, 'False', 1),  # not known
]


@pytest.mark.parametrize('fields,room,guess,rows,again,compiled', FORMS)
def test_the_fastest_form_of_a_step_that_fits_is_chosen(fields, room, guess, rows, again, compiled):
  """Of plans of 4 GB a row, 1 GB with remat: most rows, no remat, and few programs compiled in vain."""
  size = lambda form: form.micro_batch * (1 if form.remat == 'True' else 4)  # noqa: E731
  made, asked = [], options(**{'batch': 64, 'micro_batch': 0, 'length': 1024, 'remat': 'auto'} | fields)
  form, program = remat.chosen(
    asked,
    lambda form: made.append(form) or form,
    lambda form: not room or size(form) <= room,
    (lambda form: guess * size(form) <= room) if room else None,
  )
  assert (form.micro_batch, form.remat, len(made)) == (rows, again, compiled) and program == form


def test_a_step_that_the_compiler_refuses_is_made_smaller():
  def compile(form):
    if form.micro_batch > 2:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: by the compiler of TPUs')
    return form

  asked = options(micro_batch=0, remat='False')
  assert remat.chosen(asked, compile, lambda form: True, lambda form: True)[1].micro_batch == 2


def one_step(params, opts, compiler, **more):
  """The loss of the first step of a run."""
  tx = optax.sgd(1.0)
  rows = types.SimpleNamespace(rows=lambda step: np.arange(4), read=lambda ids: batch())
  state = {'params': jax.tree.map(jnp.copy, params), 'optimizer': tx.init(params)}
  args = {'stop': 1, 'total': 1, 'dtype': jnp.float32, 'compiler': compiler, **more}
  (done,) = loop.recover_model(CONFIG, state, rows, opts, tx, **args)
  return done.metrics['loss']


def test_documents_of_their_own_rows_need_no_segments(params):
  """What follows a document in its row, padding, changes neither loss nor gradient."""
  tokens, targets, segments = batch()
  segments[:, 9:], targets[:, 9:] = 0, False
  teacher = jax.tree.map(lambda x: 1.1 * x, params)
  expected, told, _ = gradient_of(params, options(), teacher=teacher, rows=(tokens, targets, segments))
  rows = np.where(segments, tokens, (tokens + 1) % 61), targets, segments
  found, metrics, _ = gradient_of(params, options(layout='padded'), teacher=teacher, rows=rows)
  assert float(metrics['loss']) == pytest.approx(float(told['loss']), rel=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, expected)


@pytest.mark.parametrize('free,compiled', [(None, 1), (0.9, 2), (1.2, 1)])
def test_remat_is_chosen_by_what_the_device_has(params, monkeypatch, free, compiled):
  """By the step's plan and what else lies there, with a tenth to spare; no remat where it is unknown."""
  opts, others = options(remat='auto', lr=1e-4, min_lr=1e-5), 10**6
  plain, kept = KeepingCompiler(), KeepingCompiler()
  loss = one_step(params, opts, plain)
  held = bytes_of(params)
  if free:
    plan = plain.made['training'].memory_analysis()
    whole = plan.argument_size_in_bytes + plan.temp_size_in_bytes + others
    stats = {'bytes_limit': int(free * whole / 0.9), 'bytes_in_use': held + others}
    monkeypatch.setattr(remat, '_stats', lambda: stats)
  assert one_step(params, opts, kept) == pytest.approx(loss, rel=1e-6)
  assert kept.counts == {'training': compiled}


def test_a_resumed_run_chooses_the_same_rows_at_once(params, monkeypatch, capfd):
  """By the plan alone, whatever else lies on the device when it is resumed."""
  opts, compiler = options(micro_batch=0, lr=1e-4, min_lr=1e-5), KeepingCompiler()
  one_step(params, opts, compiler)
  assert not capfd.readouterr().out.count('rows at once')  # the memory of a CPU is not known
  limit = int(remat.planned(compiler.made['training']) / 0.9) - 1
  lines = []
  for in_use in (0, 10**9):
    monkeypatch.setattr(remat, '_stats', lambda n=in_use: {'bytes_limit': limit, 'bytes_in_use': n})
    one_step(params, opts, Compiler(), title='stage 1 recover', beside=0)
    lines.append([x for x in capfd.readouterr().out.splitlines() if 'at once' in x])
  assert lines[0] == lines[1]
  assert re.match(r'stage 1 recover: \d rows at once on a device, with remat: ', lines[0][0])


def test_rotary_tables_are_constants_of_the_program(params):
  """Else XLA's CPU backend takes sines anew in every fusion that uses them, forward and backward."""
  tx = optax.sgd(1.0)
  step = TrainingStep(CONFIG, options(), tx, jnp.float32)
  text = jax.jit(step).lower({'params': params, 'optimizer': tx.init(params)}, batch()).as_text()
  assert 'dot_general' in text and 'sine' not in text


# Documents in one row

DOCUMENTS = (5, 4, 3), (12,), (1, 9), (7,)  # lengths by row; what is missing to 12 is padding


def packed():
  """(tokens, targets, segments) of packed rows; tokens and targets of the same, each in a row alone.

  What follows a document in its own row is out of its sight, as attention is causal.
  """
  rng = np.random.default_rng(1)
  tokens, targets, segments = (np.zeros((4, 12), dtype) for dtype in (np.int32, bool, np.int32))
  alone_tokens, alone_targets, own = np.zeros((7, 12), np.int32), np.zeros((7, 12), bool), iter(range(7))
  for row, lengths in enumerate(DOCUMENTS):
    for number, length in enumerate(lengths):
      place = row, slice(sum(lengths[:number]), sum(lengths[: number + 1]))
      alone = next(own), slice(0, length)
      alone_tokens[alone], alone_targets[alone] = rng.integers(0, 61, length), rng.random(length) < 0.7
      alone_targets[:, 0] = False
      tokens[place], targets[place] = alone_tokens[alone], alone_targets[alone]
      segments[place] = number + 1
  return (tokens, targets, segments), (alone_tokens, alone_targets)


def mean_loss_alone(params, teacher=None, alpha=0.0):
  """Of all targets, each document by itself and without segments; alpha of KL(teacher, student) at T = 1."""
  tokens, targets = packed()[1]
  logp = jax.nn.log_softmax(llama.apply(CONFIG, params, tokens)[:, :-1])
  loss = -jnp.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]
  if teacher is not None:
    taught = jax.nn.log_softmax(llama.apply(CONFIG, teacher, tokens)[:, :-1])
    loss = alpha * (jnp.exp(taught) * (taught - logp)).sum(-1) + (1 - alpha) * loss
  return (loss * targets[:, 1:]).sum() / targets.sum()


@pytest.mark.parametrize('micro_batch,remat,alpha', [(4, 'False', 0.0), (1, 'auto', 1.0), (2, 'True', 0.5)])
def test_gradients_of_packed_documents_are_those_of_each_alone(params, micro_batch, remat, alpha):
  """However the batch is cut, each target weighs the same; tied embeddings get both their gradients.

  Of the distilled loss too: the teacher sees the same borders.
  """
  teacher = jax.tree.map(lambda x: x * 1.2, params) if alpha else None
  loss, expected = jax.jit(jax.value_and_grad(mean_loss_alone))(params, teacher, alpha)
  opts = options(micro_batch=micro_batch, remat=remat, distill=DistillOptions(alpha=alpha))
  ours, metrics, _ = gradient_of(params, opts, teacher=teacher, rows=packed()[0])
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(expected), rtol=1e-4)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_host_asks_the_device_for_no_rates_between_steps(monkeypatch):
  """It would wait for the steps that the device has still to do."""
  order = []

  def schedule(options, total):
    def rate(step):
      order.append('rate')
      return 1e-4 * np.asarray(step)

    return rate

  def program(state, rows):
    order.append('step')
    return state, {'loss': np.float32(1), 'gradient_norm': np.float32(1)}

  monkeypatch.setattr(loop, 'learning_rate', schedule)
  data = types.SimpleNamespace(rows=lambda step: np.arange(4), read=lambda ids: batch())
  steps = {'start': 2, 'stop': 6, 'total': 8, 'teacher': None, 'title': 'recover'}
  done = list(loop.run_steps({}, program, data, options(), **steps))
  assert order == ['rate', *4 * ['step']]
  np.testing.assert_allclose([x.metrics['learning_rate'] for x in done], [2e-4, 3e-4, 4e-4, 5e-4])
