"""Every program on meshes of four simulated devices: the same figures, and nothing gathered without need."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import MeshOptions
from adapt_jax.configs import base
from adapt_jax.machine import mesh
from adapt_jax.machine.compiled_text import CompiledText
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import made_for
from adapt_jax.models.network.sharding import placed, shardings
from adapt_jax.pruning import curvature, narrow, surgery
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS
from adapt_jax.pruning.compensate import Compensator
from adapt_jax.pruning.criteria import IMPORTANCES
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.pruning.serving_widths import aligned
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep, batch_shapes

SHAPES = (LayerShape(8, 4, 24), LayerShape(4, 2, 32), LayerShape(8, 4, 16))


def set_mesh(data=1, fsdp=2, tensor=2):
  axes = ('data', 'fsdp', 'tensor')
  return jax.set_mesh(jax.make_mesh((data, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3))


@functools.cache
def make_model(family='llama', layers=SHAPES):
  config = ModelConfig(
    family, 50, 32, 8, layers, RopeConfig(1e4), 1e-5, family == 'llama', qkv_bias=family == 'qwen2'
  )
  init = jax.jit(lambda key: jax.tree.map(lambda x: 3 * x, llama.init_params(config, key)))
  return config, init(jax.random.key(0))


def tokens_of(config, rows=8, length=12, seed=1):
  return np.asarray(jax.random.randint(jax.random.key(seed), (rows, length), 0, config.vocab_size), np.int32)


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A GPU of a host; JAX counts every host of a cluster as a slice."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H100'


@pytest.mark.parametrize('sizes', [(1, -1, 1), (2, 4, 1), (1, 2, 4), (4, 1, 2)])
def test_a_mesh_over_several_hosts(sizes):
  """The outer axes span hosts, so that what is exchanged most, `tensor`, stays within one."""
  gpus = [Gpu(i, i // 4) for i in range(8)]
  found = mesh.make_mesh(MeshOptions(*sizes), gpus)
  assert found.devices.shape == ((1, 8, 1) if -1 in sizes else sizes)
  assert found.devices.ravel().tolist() == gpus and found.are_all_axes_auto
  with pytest.raises(InputError, match='7 devices in 2 hosts'):
    mesh.make_mesh(MeshOptions(1, -1, 1), gpus[:7])


def put(tree):
  return jax.device_put(tree, shardings(tree))


def put_tokens(tokens):
  return mesh.put_rows(np.arange(len(tokens)), lambda ids: (tokens[ids],))[0]


def assert_close(ours, expected, rtol=2e-5):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=rtol * np.abs(b).max() + 1e-30)


def share(x):
  """Elements of one device's share."""
  return x.addressable_shards[0].data.size


def moved(program):
  """{operation: elements of its largest array} of a compiled program."""
  found = {}
  for sent in CompiledText(program.as_text()).collectives():
    elements = np.prod([int(n) for n in re.search(r'\[(.*)\]', sent.shape)[1].split(',') if n], dtype=int)
    found[sent.kind] = max(found.get(sent.kind, 0), elements)
  return found


# -- the mesh ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('sizes,devices', [((1, -1, 3), 8), ((2, 2, 1), 8), ((4, 4, 1), 8)])
def test_a_mesh_that_the_devices_do_not_make_is_refused(sizes, devices):
  with pytest.raises(InputError, match=rf'mesh \(data = {sizes[0]}, .*{devices}'):
    mesh.mesh_shape(MeshOptions(*sizes), devices)


def test_what_cannot_be_split_is_reported():
  config, _ = make_model()
  with (
    set_mesh(1, 1, 4),
    pytest.raises(InputError, match='mesh.tensor = 4 .* KV heads of layer 1'),
  ):
    mesh.check_model(config)
  with set_mesh(1, 4, 1), pytest.raises(InputError, match='mesh.fsdp = 4 does not divide the 30'):
    mesh.check_model(ModelConfig('llama', 50, 30, 8, SHAPES, RopeConfig(1e4), 1e-5, True))
  values = base.get_config()
  values.prune.calibration.samples = 6
  with (
    set_mesh(2, 2, 1),
    pytest.raises(InputError, match='calibration.samples = 6 must be a multiple of the 4'),
  ):
    mesh.check_batches(from_dict(values.to_dict()))


def test_a_tensor_axis_keeps_widths_divisible():
  options = from_dict({'prune': {'align_ffn': 6}})
  assert aligned(options) == options
  with set_mesh(1, 1, 4):
    assert aligned(options).prune.multiples == (4, 12, 1)


def test_micro_batches_are_as_large_as_allowed_on_every_device():
  assert mesh.rows_at_once(32, 5) == 4  # the largest divisor of 32
  with set_mesh(1, 4, 1):
    assert mesh.rows_at_once(32, 5) == 16 and mesh.rows_at_once(32, 100) == 32


# -- the programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('importance', ['taylor_mix', 'fluctuation', 'curvature'])
def test_scores_are_those_of_one_device(importance):
  config, params = make_model()
  tokens, plan = tokens_of(config), PrunePlan.dense(config)
  stacked = jax.jit(lambda p: surgery.stack(p, plan, jnp.float32))(params)
  expected = jax.jit(Scorer(config, importance, micro_batch=4))(stacked, tokens)
  with set_mesh():
    stacked, tokens = put(stacked), put_tokens(tokens)
    program = Compiler()('scoring', Scorer(config, importance, micro_batch=4), stacked, tokens)
    scores = program(stacked, tokens)
  assert_close(scores, expected, rtol=2e-4 if IMPORTANCES[importance].curvature else 2e-5)
  assert all(x.is_fully_replicated for x in jax.tree.leaves(scores))  # every process reads them


@pytest.mark.parametrize('channels', [128, 102])
def test_costs_of_channels_are_those_of_one_device(channels):
  """Several channels a round, split over all devices; 102 channels are whole on each of the four."""
  rng = np.random.default_rng(0)
  weight, x, g = (
    rng.normal(size=shape).astype(np.float32) for shape in ((32, channels), (400, channels), (90, 32))
  )
  args = weight, x.T @ x, g.T @ g
  expected = jax.jit(curvature.channel_costs)(*args)
  with set_mesh():
    program = mesh.jit(curvature.channel_costs, *args).lower(*args).compile()
    found = program(*args)
  assert_close(found, expected, rtol=1e-4)
  assert bool(CompiledText(program.as_text()).collectives()) == (channels % 4 == 0)


def train_options(**kw):
  values = base.get_config()
  values.train.update({'tokens': 8 * 12 * 20, 'batch': 8, 'micro_batch': 1, 'length': 12, 'lr': 1e-3, **kw})
  return from_dict(values.to_dict()).train


def test_a_training_step_is_that_of_one_device(monkeypatch):
  """Logits in chunks too; the optimizer's state is split as its parameters are, the new as the old."""
  monkeypatch.setattr('adapt_jax.training.loss._CHUNK_ELEMENTS', 50 * 7)
  config, params = make_model('qwen2')
  tokens = tokens_of(config)
  targets = np.random.default_rng(0).random(tokens.shape) < 0.6
  segments = 1 + (np.arange(12) > np.arange(8)[:, None]).astype(np.int32)  # two documents a row
  options = train_options(remat='True')
  tx = optax.sgd(1.0, momentum=0.9)  # Adam would make rounding of tiny gradients visible
  state = {'params': params, 'optimizer': tx.init(params)}
  expected, metrics = jax.jit(TrainingStep(config, options, tx, jnp.float32))(
    state, (tokens, targets, segments)
  )
  with set_mesh():
    placed_state = {'params': put(params)}
    placed_state['optimizer'] = mesh.jit(tx.init, placed_state['params'])(placed_state['params'])
    batch = put_tokens(tokens), put_tokens(targets), put_tokens(segments)
    step = TrainingStep(config, options, tx, jnp.float32)
    program = Compiler()('training', step, placed_state, batch, donate_argnums=(0,))
    before = jax.tree.map(lambda x: x.sharding, placed_state)
    ours, our_metrics = program(placed_state, batch)
  assert_close(our_metrics, metrics)
  assert_close(ours['params'], expected['params'], rtol=1e-4)
  after = jax.tree.map(lambda x: x.sharding, ours)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.spec == b.spec, before, after)))
  moments = ours['optimizer'][0].trace
  for weight, moment in zip(jax.tree.leaves(ours['params']), jax.tree.leaves(moments), strict=True):
    assert weight.sharding.spec == moment.sharding.spec
  down = ours['params']['layers'][0]['mlp']['down']
  assert share(down) * 4 == down.size


@pytest.mark.parametrize('sizes', [(2, 2, 1), (1, 2, 2)])
def test_a_step_gathers_the_head_once_and_reduces_its_gradient_once(sizes, monkeypatch):
  """However many micro-batches and chunks of tokens there are; the teacher's head is gathered once too."""
  V, D, micro_batches = 96, 32, 2
  # In the form for accelerators; a chunk is two tokens of each device, a micro-batch six chunks or more.
  monkeypatch.setattr('adapt_jax.training.loss._CHUNK_ELEMENTS', V * 2 // 64)
  config = ModelConfig('llama', V, D, 8, SHAPES[:1], RopeConfig(1e4), 1e-5, tie_embeddings=False)
  shards, tensor = sizes[0] * sizes[1], sizes[2]
  options = train_options(distill={'alpha': 1.0}, micro_batch=8 // micro_batches // shards)
  tx = optax.sgd(1.0)
  with set_mesh(*sizes), made_for('gpu'):
    params = placed(llama.abstract_params(config))
    state = {'params': params, 'optimizer': jax.eval_shape(tx.init, params)}
    args = state, batch_shapes(options), params
    step = TrainingStep(config, options, tx, jnp.float32, config)
    sent = CompiledText(mesh.jit(step, *args).lower(*args).compile().as_text()).collectives()
  # [D, V] is the order of axes of no array but the head's gradient.
  reduced = [x for x in sent if 'reduce' in x.kind and x.shape.endswith(f',{V // tensor}]')]
  assert sum(x.times for x in reduced) == 1, reduced
  gathered = [x for x in sent if x.kind == 'all-gather' and x.shape == f'f32[{V // tensor},{D}]']
  assert [x.times for x in gathered] == [1, 1]
  in_chunks = [x for x in sent if x.times > micro_batches]
  assert all(x.bytes <= 2 * D * 4 for x in in_chunks), in_chunks  # one chunk's tokens at most
  assert in_chunks  # otherwise the loop over chunks was not found


@pytest.mark.parametrize('kind,unit', [('least_squares', QUERY_HEADS), ('bias', KV_GROUPS)])
def test_compensation_is_that_of_one_device(kind, unit):
  by_head = (LayerShape(8, 2, 24), LayerShape(6, 2, 32))
  config, params = make_model(layers=SHAPES if unit is KV_GROUPS else by_head)
  if kind == 'bias':
    config, params = surgery.with_output_bias(config, params)
  plan = PrunePlan.dense(config, unit)
  masks = tuple(m.copy() for m in surgery.padded_masks(plan))
  masks[0][0, 1:3] = False
  masks[1][:, ::4] = False
  stacked, tokens = jax.jit(lambda p: surgery.stack(p, plan, jnp.float32))(params), tokens_of(config)
  program = Compensator(config, kind, 8, unit=unit)
  expected = jax.jit(program)(stacked, masks, tokens)
  with set_mesh():
    stacked, tokens = put(stacked), put_tokens(tokens)
    changes = Compiler()('x', program, stacked, masks, tokens)(stacked, masks, tokens)
  assert_close(changes, expected, rtol=1e-3)
  if kind == 'least_squares':
    assert share(changes['down']) * 4 == changes['down'].size


@pytest.mark.parametrize('what', ['curvature', 'least squares', 'narrowing'])
def test_pruning_sends_weights_and_sums_once_however_many_micro_batches(what):
  """Each layer's weights are gathered once in each direction, and the devices' second moments added once."""
  config, _ = make_model(layers=SHAPES[:1] * 3)
  plan, width = PrunePlan.dense(config), 24

  def bytes_sent(micro_batch):
    masks, basis = surgery.padded_masks(plan), jax.ShapeDtypeStruct((config.hidden_size, width), jnp.float32)
    program, others = {
      'curvature': (Scorer(config, 'curvature', micro_batch=micro_batch), ()),
      'least squares': (Compensator(config, 'least_squares', micro_batch), (masks,)),
      'narrowing': (narrow.Narrower(config, micro_batch, jnp.float32, width), (basis,)),
    }[what]
    with set_mesh(1, 4, 1), made_for('gpu'):
      params = placed(llama.abstract_params(config))
      stacked = placed(jax.eval_shape(lambda p: surgery.stack(p, plan, jnp.float32), params))
      args = stacked, *others, jax.ShapeDtypeStruct((16, 12), jnp.int32, sharding=mesh.row_sharding())
      lowered = mesh.jit(program, *args).lower(*args)
    # Only the CPU's compiler moves what a loop gathers in front of it.
    text = lowered.compile({'xla_disable_hlo_passes': 'while-loop-invariant-code-motion'}).as_text()
    return sum(x.bytes * x.times for x in CompiledText(text).collectives())

  assert 0 < bytes_sent(4) <= 1.02 * bytes_sent(16)


def test_narrowing_is_that_of_one_device():
  """The signs of eigenvectors are free, so the functions are compared; the weights are split as others."""
  config, params = make_model()
  width, tokens = config.hidden_size - 8, tokens_of(config)
  small = narrow.narrowed_config(config, width)
  options = {'micro_batch': 8, 'dtype': jnp.float32, 'compiler': Compiler()}
  alone = narrow.narrow(config, params, tokens, width, **options)
  with set_mesh():
    found = narrow.narrow(
      config, put(params), put_tokens(tokens), width, **options | {'compiler': Compiler()}
    )
    down = found['layers'][0]['mlp']['down']
    assert share(down) * 4 == down.size
    found = jax.device_get(found)
  expected = llama.apply(small, alone, tokens)
  np.testing.assert_allclose(llama.apply(small, found, tokens), expected, rtol=0, atol=2e-3)


# -- compaction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('sizes', [(1, 4, 1), (1, 2, 2)])
def test_compaction_keeps_every_array_split(sizes):
  """With fsdp no byte moves between devices; a tensor axis moves no parameter to one place."""
  layers = (LayerShape(8, 4, 64),) * 2
  config, params = make_model(layers=layers)
  state = {'params': params, 'optimizer': optimizer(train_options(), 20).init(params)}
  plan = PrunePlan.dense(config)
  for kv, ffn in zip(plan.kv, plan.ffn, strict=True):
    kv[1:3], ffn[5:37] = False, False

  def cut(state):
    return surgery.compact_optimizer(state, state['params'], plan)

  expected = jax.jit(cut)(state)
  with set_mesh(*sizes):
    state = jax.device_put(state, shardings(state))
    program = mesh.jit(cut, state).lower(state).compile()
    compacted = program(state)
    want = placed(jax.eval_shape(cut, state))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), compacted, expected)))
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding.spec == b.sharding.spec, compacted, want)))
  sent = moved(program)
  if sizes[2] == 1:
    assert not sent
  else:  # [F, D] has 64 * 32 elements
    assert max(sent.values()) <= 64 * 32 // sizes[1]


# -- rows -------------------------------------------------------------------------------------------------


def test_every_row_is_read_once():
  read = []
  data = np.arange(80).reshape(16, 5)

  def rows(ids):
    read.extend(ids.tolist())
    return data[ids], data[ids] > 3

  ids = np.array([3, 1, 4, 15, 9, 2, 6, 5])
  with set_mesh(1, 2, 2):  # two devices share each half of the rows
    first, second = mesh.put_rows(ids, rows)
  assert sorted(read) == sorted(ids.tolist())
  np.testing.assert_array_equal(first, data[ids])
  np.testing.assert_array_equal(second, data[ids] > 3)
  assert {s.data.shape for s in first.addressable_shards} == {(4, 5)}
