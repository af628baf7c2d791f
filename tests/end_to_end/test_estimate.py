"""Mode estimate: what the compiler says of memory at full size, and the arithmetic beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from adapt_jax.config.build import declarations, from_dict
from adapt_jax.configs import adapt, base
from adapt_jax.machine import targets
from adapt_jax.machine.targets import TARGETS
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_config
from adapt_jax.models.network import llama
from adapt_jax.modes import estimate, estimate_programs
from adapt_jax.modes.estimate_programs import Footprint, Memory, Planned, Program
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pruning.narrow import narrowed_config
from tests.support import runs

LLAMA_8B = ModelConfig(
  'llama', 128_256, 4096, 128, (LayerShape(32, 8, 14_336),) * 32, RopeConfig(5e5), 1e-5, False
)


def options(config=None, **train):
  values = config or base.get_config()
  values.train.update({'tokens': 10**8, 'remat': True, 'micro_batch': 1, **train})
  values.train.distill.alpha = 0.0  # a teacher would be among the arguments; it has tests of its own
  return from_dict(values.to_dict())


def mesh(fsdp, tensor):
  axes = ('data', 'fsdp', 'tensor')
  return jax.set_mesh(jax.make_mesh((1, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3))


def small(layers=8):
  return ModelConfig('llama', 1000, 256, 32, (LayerShape(8, 4, 1024),) * layers, RopeConfig(1e4), 1e-5, True)


def test_scoring_holds_no_gradient_tree_at_8b():
  """512 x 64 tokens, bf16, one device: beside the weights' 16 GB less than as much; gradients are 32 GB.

  A layer adds its input on all tokens, far less than its gradient.
  """
  plan = Footprint(options(adapt.get_config()), LLAMA_8B, jnp.bfloat16)
  whole, half = plan.scoring(32).memory, plan.scoring(16).memory
  assert whole.arguments == pytest.approx(2 * count_params(LLAMA_8B), rel=1e-3)
  assert whole.temporary < 2 * count_params(LLAMA_8B)
  inputs, gradient = 512 * 64 * 4096 * 2, 4 * (count_params(LLAMA_8B) - 2 * 128_256 * 4096) / 32
  added = (whole.temporary - half.temporary) / 16
  assert inputs <= added < 1.2 * inputs < gradient / 2


@pytest.mark.parametrize('fsdp,tensor,mu_dtype,size', [(4, 1, 'float32', 12), (2, 2, 'bfloat16', 10)])
def test_every_device_holds_its_share_of_weights_and_moments(fsdp, tensor, mu_dtype, size):
  config = small()
  with mesh(fsdp, tensor):
    plan = Footprint(options(batch=8, length=64, mu_dtype=mu_dtype), config, jnp.float32)
    state = estimate_programs.bytes_of(plan.state(config, True))
    memory = plan.training(config, config.num_layers).memory
  share = size * count_params(config) / 4  # fp32 weights and second moments, first moments in mu_dtype
  assert share <= state < 1.02 * share  # norms are whole everywhere
  assert state <= memory.arguments < 1.05 * state
  assert memory.results < 0.01 * state  # the new state replaces the old


def test_a_layer_adds_shares_and_nothing_whole():
  """Over FSDP weights are gathered when their turn comes, and a gradient is split as soon as it is there."""
  config = small(layers=8)
  with mesh(4, 1):
    plan = Footprint(options(batch=16, length=16), config, jnp.float32)
    deep, shallow = plan.training(config, 8).memory, plan.training(config, 4).memory
  share = 4 * (count_params(config) - 1000 * 256) / 8 / 4
  assert (deep.temporary - shallow.temporary) / 4 < 2 * share


def test_two_depths_tell_the_whole():
  """Deep enough that the layers decide the peak, not the head."""
  config = small(layers=24)
  with mesh(4, 1):
    plan = Footprint(options(batch=4, length=64), config, jnp.float32)
    whole = plan.training(config, 24)
    guess = plan.training(config, 16).extrapolated(plan.training(config, 12), 16, 12, 24)
  assert guess.memory.arguments == pytest.approx(whole.memory.arguments, rel=1e-3)
  assert guess.memory.total == pytest.approx(whole.memory.total, rel=0.03)
  assert guess.moved == pytest.approx(whole.moved, rel=0.03)
  for kind, size in whole.sent.items():
    assert guess.sent[kind] == pytest.approx(size, rel=0.01, abs=1e4)
  deep = Program(Memory(30.0, 10.0, 2.0), 4.0, 8.0, {'all-gather': 6.0}, {'all-gather': 3.0})
  shallow = Program(Memory(20.0, 8.0, 2.0), 3.0, 6.0, {}, {})
  assert deep.extrapolated(shallow, 4, 2, 8) == Program(
    Memory(50.0, 14.0, 2.0), 6.0, 12.0, {'all-gather': 18.0}, {'all-gather': 9.0}
  )


def test_forward_flops_are_those_of_the_compiled_program():
  config, length = small(layers=2), 64
  tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
  program = jax.jit(lambda p, t: llama.apply(config, p, t)).lower(llama.abstract_params(config), tokens)
  counted = program.compile().cost_analysis()['flops'] / (2 * length)
  # The compiled program computes masked scores too, which a better one would not, and norms.
  masked = sum(2 * length * s.num_heads * config.head_dim for s in config.layers)
  assert flops.forward(config, length) + masked == pytest.approx(counted, rel=0.03)


def test_stages_end_at_their_targets():
  values = base.get_config()
  values.prune.target, values.prune.stages, values.prune.align_ffn = 0.5, 4, 128
  found = [count_params(c) for c in estimate_programs.stage_configs(options(values), LLAMA_8B)]
  targets = np.linspace(1, 0.5, 5)[1:] * count_params(LLAMA_8B)
  assert all(0 <= t - n < 128 * 3 * 4096 for t, n in zip(targets, found, strict=True))


def test_a_teacher_that_is_asked_before_lies_beside_nothing(tmp_path):
  config = runs.make_config(runs.make_files(tmp_path))
  config.train.distill.update({'alpha': 1.0, 'cache': 8})
  options = from_dict(config.to_dict())
  dense = open_config(options.model.source)
  plan = Footprint(options, dense, jnp.dtype(jnp.float32))
  stages = estimate_programs.stage_configs(options, dense)
  found = estimate_programs.programs(plan, stages)
  teacher = found['teacher, before anything else']
  asked, beside = teacher.program.memory, teacher.other
  tokens = options.train.batch * options.train.length
  weights = estimate_programs.bytes_of(llama.abstract_params(dense, jnp.float32))
  assert (asked.arguments, beside) == (weights + tokens * (4 + 4), 0)
  assert 0 <= asked.results - tokens * (4 * 8 + 4 * 9) < 64  # and the tuple of both
  training = list(found.values())[-1].program.memory
  state = estimate_programs.bytes_of(plan.state(stages[0], True))
  assert training.arguments == state + tokens * (4 + 1 + 4 + 4 * 8 + 4 * 9)
  # The step does not run the dense model, which one that distils from it directly does.
  plain = runs.make_config(tmp_path)
  beside_options = from_dict(plain.to_dict() | {'train': plain.train.to_dict() | {'distill': {'alpha': 1.0}}})
  student = flops.forward(stages[0], options.train.length)
  in_step = flops.training(beside_options, dense, student) - flops.training(options, dense, student)
  assert in_step == pytest.approx(flops.forward(dense, options.train.length))


def test_every_program_of_a_run_with_a_teacher(tmp_path):
  """No weights are read, and training's arguments are what a step is given, to the byte."""
  config = runs.make_config(runs.make_files(tmp_path))
  config.train.distill.alpha = 0.5
  (tmp_path / 'model/model.safetensors').unlink()
  options = from_dict(config.to_dict())
  dense = open_config(options.model.source)
  plan = Footprint(options, dense, jnp.dtype(jnp.float32))
  stages = estimate_programs.stage_configs(options, dense)
  found = estimate_programs.programs(plan, stages)
  names = [name.split()[0].strip(',') for name in found]
  assert names == ['stacking', 'scoring', 'scoring', 'compensation', 'correction', 'compaction', 'training']
  assert all(
    x.program.memory.temporary > 0 for name, x in found.items() if name not in ('correction', 'compaction')
  )
  teacher, weights = (
    estimate_programs.bytes_of(x)
    for x in (llama.abstract_params(dense, jnp.float32), plan.state(dense, False))
  )
  stacking, beside = found['stacking, first stage'].program.memory, found['stacking, first stage'].other
  assert (stacking.arguments, stacking.results) == (weights, estimate_programs.bytes_of(plan.stacked(dense)))
  assert beside == teacher and 0 < stacking.temporary < stacking.results
  compaction = found['compaction'].program.memory
  before, after = (estimate_programs.bytes_of(plan.state(stage, True)) for stage in stages)
  assert (compaction.arguments, compaction.results) == (before, after)
  # The first stage is scored without the fp32 weights that are beside the stacked ones in the second.
  first, second = (found[name].other for name in found if name.startswith('scoring'))
  assert second - first == estimate_programs.bytes_of(plan.state(stages[0], True))

  memory, beside = list(found.values())[-1].program.memory, list(found.values())[-1].other
  state = estimate_programs.bytes_of(plan.state(stages[0], True))
  batch = options.train.batch * options.train.length * (4 + 1 + 4)  # ids, targets, segments
  assert (memory.arguments, beside) == (state + teacher + batch, 0)


def test_biases_are_planned_too(tmp_path, capsys):
  config = runs.make_config(runs.make_files(tmp_path))
  config.estimate.devices, sizes = 0, []
  for config.prune.compensate in ('none', 'bias'):
    estimate.run(from_dict(config.to_dict()))
    sizes.append(int(capsys.readouterr().out.split(' parameters on ')[0].split(': ')[-1].replace(',', '')))
  dense = open_config(config.model.source)
  assert sizes[1] - sizes[0] == 2 * dense.num_layers * dense.hidden_size


def test_a_program_is_limited_by_its_slowest_part():
  """An H100: 989 TFLOP/s, 3,350 GB/s, 450 GB/s."""
  sent = {'all-gather': 80e9, 'all-reduce': 9e9}
  program = Program(Memory(0, 0, 0), 98.9e12, 670e9, sent, {})
  found = estimate.limit(program, TARGETS['h100'])
  assert found.products == pytest.approx(0.1) and found.memory == pytest.approx(0.2)
  assert found.network == pytest.approx(89 / 450)
  assert found.shortest == found.memory and found.longest == pytest.approx(0.3 + found.network)


@pytest.mark.parametrize(
  'target,count,name',
  [
    ('tpu-v5e', 1, 'v5e:2x2'),
    ('tpu-v5e', 8, 'v5e:2x4'),
    ('tpu-v6e', 256, 'v6e:16x16'),
    ('tpu-v5p', 4, 'v5p:2x2x1'),
    ('tpu-v5p', 8, 'v5p:2x2x2'),
    ('tpu-v5p', 16, 'v5p:2x2x4'),
    ('tpu-v5p', 64, 'v5p:4x4x4'),
  ],
)
def test_a_slice_of_tpus_has_the_shape_that_is_sold(target, count, name):
  assert targets.slice_name(TARGETS[target], count) == name


def test_every_target_can_be_named():
  choices = {field: declared.choices for field, declared in declarations()}
  assert choices['estimate.target'] == tuple(TARGETS)


@pytest.mark.parametrize('target,count', [('tpu-v5e', 6), ('tpu-v6e', 512), ('tpu-v5p', 3)])
def test_other_numbers_of_tpus_are_refused(target, count):
  with pytest.raises(InputError, match=f'estimate.devices = {count}: a slice of these TPUs'):
    targets.slice_name(TARGETS[target], count)


def test_training_counts_less_in_later_stages(tmp_path):
  """Their model is smaller; scoring, and corrections, count as often as a run executes them."""
  config = runs.make_config(runs.make_files(tmp_path))
  config.prune.method = 'obs'
  options = from_dict(config.to_dict())
  dense = open_config(options.model.source)
  plan = Footprint(options, dense, jnp.dtype(jnp.float32))
  stages = estimate_programs.stage_configs(options, dense)
  found = estimate_programs.programs(plan, stages)
  schedule = Schedule.of(options, budget_of(options, dense))
  times = {name.split()[0].strip(','): x.times for name, x in found.items() if x.times}
  assert times['scoring'] == times['compensation'] == 2  # stages, each in one shot
  in_first = schedule.end(1) - schedule.start(1)
  assert in_first < times['training'] < schedule.train_steps


def test_what_is_computed_again_takes_time_but_does_not_count(tmp_path):
  """Without a teacher, recomputation is a fourth of the operations of a step."""
  config = runs.make_config(runs.make_files(tmp_path))
  config.train.remat, config.train.distill.alpha, config.prune.stages = True, 0.0, 1
  options = from_dict(config.to_dict())
  dense = open_config(options.model.source)
  plan = Footprint(options, dense, jnp.dtype(jnp.float32))
  found = estimate_programs.programs(plan, estimate_programs.stage_configs(options, dense))
  useful = {name.split()[0].strip(','): planned.useful for name, planned in found.items()}
  assert useful['scoring'] == 1.0 and useful['training'] == pytest.approx(0.75)
  program = Program(Memory(0, 0, 0), 98.9e12, 670e9, {}, {})  # 0.1 and 0.2 seconds of an H100
  *_, row = estimate._limit_table({'training': Planned(program, 0, 1, 0.75)}, TARGETS['h100'])
  assert row.endswith('| 25% to 38% |')


def test_a_narrowed_run_is_planned_with_the_whole_model_as_its_teacher(tmp_path, capsys):
  """Its two more programs are those of the run; the narrowed weights stay while they are first scored."""
  config = runs.make_config(runs.make_files(tmp_path))
  whole = open_config(config.model.source)
  config.train.distill.alpha, config.prune.hidden = 1.0, whole.hidden_size - 8
  narrowed = narrowed_config(whole, config.prune.hidden)
  config.prune.target = 0.8 * count_params(narrowed) / count_params(whole)
  options = from_dict(config.to_dict())
  stages = estimate_programs.stage_configs(options, whole)
  plan = Footprint(options, whole, jnp.dtype(jnp.float32))
  found = estimate_programs.programs(plan, stages)
  assert {stage.hidden_size for stage in stages} == {narrowed.hidden_size}
  assert count_params(stages[-1]) <= options.prune.target * count_params(whole)  # the target is of the whole

  def size(config, dtype=jnp.float32):
    return estimate_programs.bytes_of(llama.abstract_params(config, dtype))

  names = [name.split()[0].strip(',') for name in found]
  assert names[:5] == ['stacking', 'moments', 'narrowing', 'stacking', 'scoring']
  narrowing = found['narrowing'].program.memory
  assert size(whole) <= narrowing.arguments < 1.1 * size(whole)  # the basis and the rows too
  assert size(narrowed) <= narrowing.results < 1.02 * size(narrowed)
  scoring = next(x for name, x in found.items() if name.startswith('scoring'))
  assert scoring.other == size(whole) + size(narrowed)  # the teacher, and the weights
  assert scoring.program.memory.arguments < narrowing.arguments
  training, batch = list(found.values())[-1], options.train.batch * options.train.length * (4 + 1 + 4)
  state = estimate_programs.bytes_of(plan.state(stages[0], True))
  assert training.program.memory.arguments == state + size(whole) + batch
  for name in ('moments of the residual stream', 'narrowing'):
    assert found[name].program.flops > 0 and found[name].times == 1
  config.estimate.devices = 0
  estimate.run(from_dict(config.to_dict()))
  assert '| narrowing |' in capsys.readouterr().out
  config.prune.target, config.prune.stages, config.train.tokens = count_params(narrowed), 1, 0
  estimate.run(from_dict(config.to_dict()))
  table = capsys.readouterr().out
  assert '| narrowing |' in table and '| scoring' not in table  # narrowing alone reaches the target
