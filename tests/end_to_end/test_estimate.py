"""Mode estimate: what the compiler says of memory at full size, and the arithmetic beside it."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from adapt_jax.config.build import from_dict
from adapt_jax.configs import adapt, base
from adapt_jax.machine import targets
from adapt_jax.machine.compiled_text import Kernel
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import bytes_of
from adapt_jax.machine.targets import TARGETS
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_config
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import CPU
from adapt_jax.modes import estimate
from adapt_jax.modes.estimate_programs import Footprint, Program, programs, stage_configs
from adapt_jax.pipeline import flops
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep, batch_shapes
from tests.support import runs

LLAMA_8B = ModelConfig(
  'llama', 128_256, 4096, 128, (LayerShape(32, 8, 14_336),) * 32, RopeConfig(5e5), 1e-5, False
)
SMALL = ModelConfig('llama', 1000, 256, 32, (LayerShape(8, 4, 1024),) * 4, RopeConfig(1e4), 1e-5, True)


def options(config=None, **train):
  values = config or base.get_config()
  values.train.update({'tokens': 10**8, 'remat': 'True', 'micro_batch': 1, **train})
  values.train.distill.alpha = 0.0  # a teacher would be among the arguments; it has tests of its own
  return from_dict(values.to_dict())


def mesh(fsdp, tensor):
  axes = ('data', 'fsdp', 'tensor')
  return jax.set_mesh(jax.make_mesh((1, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3))


def half(config):
  return config.with_layers(config.layers[: config.num_layers // 2])


def weights(config):
  return bytes_of(llama.abstract_params(config, jnp.float32))


def planned(options):
  """The footprint of a run in fp32, the models after its stages, and its programs by the first word."""
  config = open_config(options.model.source)
  plan, stages = Footprint(options, config, jnp.dtype(jnp.float32)), stage_configs(options, config)
  return plan, stages, [(name.split()[0].strip(','), x) for name, x in programs(plan, stages).items()]


def test_scoring_holds_no_gradient_tree_at_8b():
  """512 x 64 tokens, bf16, one device: beside the weights' 16 GB less than as much; gradients are 32 GB.

  A layer adds its input on all tokens, far less than its gradient.
  """
  asked = options(adapt.get_config())
  whole, less = (Footprint(asked, c, jnp.bfloat16).scoring() for c in (LLAMA_8B, half(LLAMA_8B)))
  assert whole.arguments == pytest.approx(2 * count_params(LLAMA_8B), rel=1e-3)
  assert whole.temporary < 2 * count_params(LLAMA_8B)
  inputs, gradient = 512 * 64 * 4096 * 2, 4 * (count_params(LLAMA_8B) - 2 * 128_256 * 4096) / 32
  added = (whole.temporary - less.temporary) / 16
  assert inputs <= added < 1.2 * inputs < gradient / 2


@pytest.mark.parametrize('fsdp,tensor,dtype,size', [(4, 1, 'float32', 12), (2, 2, 'bfloat16', 8)])
def test_every_device_holds_its_share_of_weights_and_moments(fsdp, tensor, dtype, size):
  with mesh(fsdp, tensor):
    plan = Footprint(options(batch=8, length=64, moments_dtype=dtype), half(SMALL), jnp.float32)
    state, program = bytes_of(plan.state(plan.config, True)), plan.training(plan.config)
  share = size * count_params(plan.config) / 4  # fp32 weights, and both moments
  assert share <= state < 1.02 * share  # norms are whole everywhere
  assert state <= program.arguments < 1.05 * state
  assert program.results < 0.01 * state  # the new state replaces the old


def test_a_layer_adds_shares_and_nothing_whole():
  """Over FSDP weights are gathered when their turn comes, and a gradient is split as soon as it is there."""
  with mesh(4, 1):
    deep, shallow = (
      Footprint(options(batch=16, length=16), c, jnp.float32).training(c) for c in (SMALL, half(SMALL))
    )
  share = 4 * (count_params(SMALL) - 1000 * 256) / 4 / 4
  assert (deep.temporary - shallow.temporary) / 2 < 2 * share


def test_stages_end_at_their_targets():
  values = base.get_config()
  values.prune.target, values.prune.stages, values.prune.align_ffn = 0.5, 4, 128
  sizes = [count_params(c) for c in stage_configs(options(values), LLAMA_8B)]
  goals = np.linspace(1, 0.5, 5)[1:] * count_params(LLAMA_8B)
  assert all(0 <= t - n < 128 * 3 * 4096 for t, n in zip(goals, sizes, strict=True))


def test_a_teacher_that_is_asked_before_lies_beside_nothing(files):
  config = runs.make_config(files)
  config.train.distill.update({'alpha': 1.0, 'cache': 8})
  asked = from_dict(config.to_dict())
  plan, stages, (*before, (_, teacher), (_, training)) = planned(asked)
  assert dict(before)['compensation'].other == weights(plan.config)  # no moments yet, in a run of one stage
  tokens = asked.train.batch * asked.train.length
  assert (teacher.arguments, teacher.other) == (weights(plan.config) + tokens * (4 + 4), 0)
  assert 0 <= teacher.results - tokens * (4 * 8 + 4 * 9) < 64  # and the tuple of both
  assert training.arguments == bytes_of(plan.state(stages[0], True)) + tokens * (4 + 1 + 4 + 4 * 8 + 4 * 9)
  # Its forward pass is not part of the step.
  assert plan.step_work(stages[0], False) == 3 * flops.forward(stages[0], asked.train.length)


def test_healing_keeps_its_moments_as_training_does(files):
  config = runs.make_config(files)
  config.train.tokens, config.prune.heal, found = 0, 1, {}
  for dtype in ('float32', 'bfloat16'):
    config.train.moments_dtype = dtype
    plan, stages, rows = planned(from_dict(config.to_dict()))
    found[dtype] = dict(rows)['healing'].arguments
  assert found['float32'] - found['bfloat16'] == 4 * count_params(stages[0])


def test_the_plan_for_this_machine_is_that_of_the_step_it_runs():
  asked, config = options(batch=4, micro_batch=4, length=64, remat='False', lr=1e-4, min_lr=1e-5), half(SMALL)
  plan = Footprint(asked, SMALL, jnp.float32, CPU)
  step = TrainingStep(config, asked.train, optimizer(asked.train, 10), jnp.float32)
  args = plan.state(config, True), batch_shapes(asked.train)
  own = Compiler()('training', step, *args, donate_argnums=(0,)).memory_analysis()
  assert plan.training(config).temporary == own.temp_size_in_bytes
  assert Footprint(asked, SMALL, jnp.float32).training(config).temporary != own.temp_size_in_bytes  # a GPU's


def test_every_program_of_a_run_with_a_teacher(files, tmp_path):
  """No weights are read, and training's arguments are what a step is given, to the byte."""
  config = runs.in_two_stages(runs.make_config(files))
  shutil.copy(files / 'model/config.json', tmp_path)
  config.model.source = str(tmp_path)
  config.train.distill.alpha, config.prune.method = 0.5, 'obs'
  asked = from_dict(config.to_dict())
  plan, stages, rows = planned(asked)
  names = ['stacking', 'scoring', 'scoring', 'compensation', 'correction', 'compaction', 'training']
  assert [name for name, _ in rows] == names
  stacking, first, second, compensation, _, compaction, training = (x for _, x in rows)
  teacher, state = weights(plan.config), bytes_of(plan.state(stages[0], True))
  calibration = asked.prune.calibration
  assert stacking.arguments == bytes_of(plan.state(plan.config, False))
  assert stacking.results == first.arguments - calibration.samples * calibration.length * 4
  assert compensation.other == teacher + max(state, weights(plan.config))
  assert stacking.other == teacher and 0 < stacking.temporary < stacking.results
  assert (compaction.arguments, compaction.results) == (state, bytes_of(plan.state(stages[1], True)))
  # The first stage is scored without the fp32 weights that are beside the stacked ones in the second.
  assert second.other - first.other == state
  batch = asked.train.batch * asked.train.length * (4 + 1 + 4)  # ids, targets, segments
  assert (training.arguments, training.other) == (state + teacher + batch, 0)
  # A run scores and corrects once a stage, and training counts less in later stages, whose model is smaller.
  assert first.times == compensation.times == 2 and second.times == 0
  in_first = plan.schedule.end(1) - plan.schedule.start(1)
  assert in_first < training.times < plan.schedule.train_steps


def test_the_mode_prints_the_size_with_biases_and_rows_for_each_target(files, capsys):
  config = runs.make_config(files)
  config.prune.target = '0.9,0.7kv'
  config.estimate.devices, config.prune.compensate, config.estimate.price = 0, 'bias', 2.5
  dense = open_config(config.model.source)
  estimate.run(from_dict(config.to_dict()))
  biased = count_params(dense) + 2 * dense.num_layers * dense.hidden_size
  table = capsys.readouterr().out
  assert f'{biased:,} parameters on' in table and ', costs ' in table.splitlines()[-1]
  for size in ('0.9', '0.7kv'):
    assert f'| {size}: 1 |' in table and f'| {size}: compaction |' in table


@pytest.mark.parametrize('sent,limit', [(89e9, 0.25), (180e9, 0.4)])
def test_kernels_take_their_time_one_after_another(sent, limit):
  """An H100: 989 TFLOP/s, 67 in float32; 3,350 GB/s; 450 GB/s, to which kernels run beside."""
  kernels = Kernel(2, 49.45e12, 0, 67), Kernel(1, 0, 3.35e12, 67), Kernel(10, 9.89e9, 0, 33_500_000_000)
  program = Program(0, 0, 0, flops=98.9e12, moved=335e9, sent=sent, times=10, kernels=kernels)
  assert estimate.limit(program, TARGETS['h100']) == pytest.approx((0.1, 0.1, sent / 450e9, limit))


def test_remat_computes_the_layers_again_but_not_the_head():
  plan = Footprint(options(length=64), SMALL, jnp.float32)
  once, again = (plan.step_work(SMALL, remat) for remat in (False, True))
  forward = flops.forward(SMALL, 64)
  assert once == 3 * forward and again == 4 * forward - 2 * SMALL.vocab_size * SMALL.hidden_size


def test_remat_is_chosen_for_the_stages_that_do_not_fit_without():
  """By the compiler's plan of each stage; the plan of the first with it is what the table shows."""
  stages = [SMALL, half(SMALL)]
  small = {'batch': 8, 'micro_batch': 8, 'length': 128}
  plans = [Footprint(options(**small, remat='False'), SMALL, jnp.float32).training(c) for c in stages]
  assert plans[0].total > plans[1].total
  for memory, expected in ((0, [False] * 2), (plans[1].total / 0.9, [True, False])):
    auto = Footprint(options(**small, remat='auto'), SMALL, jnp.float32, memory=memory)
    assert auto.remat(stages) == expected == [auto.training(c).remat for c in stages]
  assert auto.training(SMALL).total < plans[0].total


@pytest.mark.parametrize(
  'target,count,name',
  [
    ('tpu-v5e', 8, 'v5e:2x4'),
    ('tpu-v5p', 16, 'v5p:2x2x4'),
    ('tpu-v5p', 64, 'v5p:4x4x4'),
    ('tpu-v5e', 6, ''),
  ],
)
def test_a_slice_of_tpus_has_a_shape_that_is_sold(target, count, name):
  if name:
    assert targets.slice_name(TARGETS[target], count) == name
  else:
    with pytest.raises(InputError, match=f'estimate.devices = {count}'):
      targets.slice_name(TARGETS[target], count)


def test_another_teacher_is_beside_the_model(files):
  config = runs.make_config(files)
  config.train.distill.alpha, config.prune.stages = 1.0, 1
  small = open_config(config.model.source)
  wide = dataclasses.replace(small, hidden_size=2 * small.hidden_size)
  asked = from_dict(config.to_dict())
  stages = stage_configs(asked, small)
  own, other = (Footprint(asked, small, jnp.dtype(jnp.float32), teacher=of) for of in (None, wide))
  more = weights(wide) - weights(small)
  assert other.training(stages[0]).arguments - own.training(stages[0]).arguments == more > 0
