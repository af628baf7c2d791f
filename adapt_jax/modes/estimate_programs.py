"""The programs of a run, compiled from shapes alone: memory of all, and what they compute, read and send.

Programs are compiled by the compiler of the target (`machine.targets`), if it is installed, and otherwise for
as many simulated CPU devices as the mesh has. For these, three passes of the CPU backend are disabled, since
their effects are those of a CPU: it computes in fp32 and converts the bf16 weights of all layers before the
loop over layers; it combines the all-reduces of all gradients into one, which needs all gradients at once;
and it removes the barriers that make it recompute a layer instead of keeping it. fp32 copies of arrays in use
remain. Operations always have the form for accelerators.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.options import RunOptions
from adapt_jax.machine import mesh
from adapt_jax.machine.compiled_text import CompiledText
from adapt_jax.machine.mesh import rows_at_once
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import CPU, Platform, made_for
from adapt_jax.models.network.sharding import device_count, placed, row_sharding
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pruning import narrow, surgery
from adapt_jax.pruning import programs as pruning_programs
from adapt_jax.pruning.attention_units import AttentionUnit
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.widths import Allocator, Widths
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep, batch_shapes
from adapt_jax.training.teacher_cache import likeliest

# Disabled passes of the CPU backend, see above.
_NOT_ON_CPU = 'while-loop-invariant-code-motion,cpu-all-reduce-combiner,cse_barrier_expander'


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device: a program's arguments, temporary buffers, results that do not replace arguments."""

  arguments: float
  temporary: float
  results: float

  @property
  def total(self) -> float:
    return self.arguments + self.temporary + self.results


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, on one device.

  Attributes:
    memory: as the compiler plans it.
    flops: floating-point operations (`pipeline.flops`).
    moved: bytes that its operations read from and write to the device's memory.
    sent: by kind of collective, bytes that the device sends.
    operations: by kind of collective, how many are executed.
  """

  memory: Memory
  flops: float = 0.0
  moved: float = 0.0
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  operations: dict[str, float] = dataclasses.field(default_factory=dict)

  def extrapolated(self, shallow: 'Program', depth: int, shallow_depth: int, layers: int) -> 'Program':
    """Extrapolates to `layers` from this one at `depth` and a shallower one: all is linear in the depth."""
    steps = (layers - depth) / (depth - shallow_depth)

    def further(deep: float, less: float) -> float:
      return deep + steps * (deep - less)

    def each(deep: dict[str, float], less: dict[str, float]) -> dict[str, float]:
      return {kind: further(deep.get(kind, 0.0), less.get(kind, 0.0)) for kind in {**deep, **less}}

    pairs = zip(dataclasses.astuple(self.memory), dataclasses.astuple(shallow.memory), strict=True)
    return Program(
      Memory(*(further(deep, less) for deep, less in pairs)),
      further(self.flops, shallow.flops),
      further(self.moved, shallow.moved),
      each(self.sent, shallow.sent),
      each(self.operations, shallow.operations),
    )


def compile_for(
  platform: Platform, fn: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> Program:
  """`fn` compiled for `args` (of `jax.ShapeDtypeStruct`) on the devices of the current mesh.

  platform: of these devices; `cpu` if they simulate accelerators.
  """
  simulated = platform.name == 'cpu' and jax.default_backend() == 'cpu'
  options = {'xla_disable_hlo_passes': _NOT_ON_CPU} if simulated else {}

  def traced_anew(*args: Any) -> Any:  # not a trace that JAX may have made for a CPU
    return fn(*args)

  made = Platform('gpu') if simulated else platform
  with made_for(made.name, made.capability):
    lowered = mesh.jit(traced_anew, *args, donate_argnums=donate_argnums).lower(*args)
  compiled = lowered.compile(compiler_options=options)
  found: Any = compiled.memory_analysis()
  fresh = found.output_size_in_bytes - found.alias_size_in_bytes
  memory = Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, fresh)
  text = CompiledText(compiled.as_text())
  sent, operations = defaultdict[str, float](float), defaultdict[str, float](float)
  for x in text.collectives():
    sent[x.kind] += x.sent * x.times
    operations[x.kind] += x.times
  return Program(memory, 0.0, text.bytes_moved(), dict(sent), dict(operations))


def bytes_of(tree: Any) -> int:
  """Bytes that a tree of `jax.ShapeDtypeStruct` with shardings takes on one device."""

  def size(x: Any) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

  return sum(size(x) for x in jax.tree.leaves(tree))


def stage_configs(options: RunOptions, config: ModelConfig) -> list[ModelConfig]:
  """The model after each stage if all layers were pruned equally; in a run, scores make them differ.

  config: of the dense model, which prune.hidden narrows first.
  """
  prune, dense, config = options.prune, config, narrow.narrowed_config(config, options.prune.hidden)
  budget = budget_of(options, config, original=dense)
  allocator = Allocator(config, prune.align_ffn, prune.align_kv, budget=budget)
  widths, found = allocator.full, []
  for target in Schedule.of(options, budget).targets:
    widths = allocator.one_shot(widths, np.ones(config.num_layers), target)
    found.append(config.with_layers(_shapes(config, widths, budget.removes)))
  return found


def _shapes(config: ModelConfig, widths: Widths, unit: AttentionUnit) -> tuple[LayerShape, ...]:
  return tuple(
    unit.narrowed(s, int(k), int(f)) for s, k, f in zip(config.layers, widths.kv, widths.ffn, strict=True)
  )


class Footprint:
  """Compiles the programs of a run.

  Args:
    options: checked options.
    whole: the config of the dense model.
    dtype: of activations and products.
    platform: of the devices of the current mesh; `cpu` if they simulate accelerators.

  `config` is that of the model that is pruned: the dense one, or what prune.hidden makes of it.
  """

  def __init__(self, options: RunOptions, whole: ModelConfig, dtype: Any, platform: Platform = CPU):
    self.options, self.whole, self.dtype, self._platform = options, whole, dtype, platform
    self.config = narrow.narrowed_config(whole, options.prune.hidden)
    self.budget = budget_of(options, self.config, original=whole)
    self.schedule = Schedule.of(options, self.budget)
    train = dataclasses.replace(options.train, lr=1e-4, min_lr=1e-5)  # the weights are not read
    self._optimizer = optimizer(train, self.schedule.train_steps)

  @property
  def _loaded(self) -> Any:
    """The dtype of the weights that are pruned."""
    return jnp.float32 if self.options.train.tokens else self.dtype

  def state(self, config: ModelConfig, moments: bool) -> Any:
    """Arrays on the devices throughout a stage: weights (fp32 if trained) and, if `moments`, Adam's."""
    params = llama.abstract_params(config, self._loaded)
    if not self.options.train.tokens or not moments:
      return placed({'params': params})
    return placed({'params': params, 'optimizer': jax.eval_shape(self._optimizer.init, params)})

  def stacked(self, config: ModelConfig) -> Any:
    """The input of scoring and compensation: all layers' weights at their original widths."""
    params = llama.abstract_params(config)
    plan = PrunePlan.dense(config, self.budget.removes)
    return placed(jax.eval_shape(lambda p: surgery.stack(p, plan, self.dtype), params))

  def unnarrowed(self, layers: int) -> Any:
    """The input of narrowing: the dense model's weights, stacked in the dtype that they are loaded in."""
    config = self.whole.with_layers(self.whole.layers[:layers])
    params = llama.abstract_params(config, self._loaded)
    plan = PrunePlan.dense(config)
    return placed(jax.eval_shape(lambda p: surgery.stack(p, plan), params))

  def stream_moments(self, layers: int) -> Program:
    """The second moments of the residual stream, before it is narrowed."""
    calibration = self.options.prune.calibration
    config = self.whole.with_layers(self.whole.layers[:layers])
    program = narrow.StreamMoments(config, pruning_programs.micro_batch(calibration), self.dtype)
    tokens = pruning_programs.calibration_tokens(calibration)
    return compile_for(self._platform, program, self.unnarrowed(layers), tokens)

  def narrowing(self, layers: int) -> Program:
    """The narrowed and fitted weights."""
    prune, config = self.options.prune, self.whole.with_layers(self.whole.layers[:layers])
    micro_batch = pruning_programs.micro_batch(prune.calibration)
    program = narrow.Narrower(config, micro_batch, self.dtype, prune.hidden)
    basis = jax.ShapeDtypeStruct((config.hidden_size, prune.hidden), jnp.float32)
    tokens = pruning_programs.calibration_tokens(prune.calibration)
    return compile_for(self._platform, program, self.unnarrowed(layers), basis, tokens)

  def scoring(self, layers: int) -> Program:
    """One scoring pass with this many layers."""
    config, prune = self.config.with_layers(self.config.layers[:layers]), self.options.prune
    scorer = pruning_programs.scoring(config, prune, self.dtype, self.budget.removes)
    tokens = pruning_programs.calibration_tokens(prune.calibration)
    return compile_for(self._platform, scorer, self.stacked(config), tokens)

  def compensation(self, layers: int) -> Program:
    """The least squares or biases after the last step of a stage."""
    config, prune = self.config.with_layers(self.config.layers[:layers]), self.options.prune
    program = pruning_programs.compensation(config, prune, self.dtype, self.budget.removes)
    plan = PrunePlan.dense(config, self.budget.removes)
    masks = tuple(jax.ShapeDtypeStruct(m.shape, m.dtype) for m in surgery.padded_masks(plan))
    tokens = pruning_programs.calibration_tokens(prune.calibration)
    return compile_for(self._platform, program, self.stacked(config), masks, tokens)

  def training(self, config: ModelConfig, layers: int) -> Program:
    """One optimizer step of a stage with this model, including the teacher."""
    t = self.options.train
    config = config.with_layers(config.layers[:layers])
    dense = self.whole.with_layers(self.whole.layers[:layers]) if t.distill.teacher_beside else None
    teacher = [placed(llama.abstract_params(dense, self.dtype))] if dense else []
    step = TrainingStep(config, t, self._optimizer, self.dtype, dense)
    return compile_for(
      self._platform, step, self.state(config, True), batch_shapes(t), *teacher, donate_argnums=(0,)
    )

  def teacher(self, layers: int) -> Program:
    """Computing the teacher's cached predictions, with distill.cache."""
    t, config = self.options.train, self.whole.with_layers(self.whole.layers[:layers])
    params = placed(llama.abstract_params(config, self.dtype))
    shape = (rows_at_once(t.batch, t.micro_batch), t.length)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding())
    return compile_for(self._platform, likeliest(config, t, self.dtype), params, rows, rows)


@dataclasses.dataclass(frozen=True)
class Planned:
  """A program of a run.

  Attributes:
    program: compiled, or only its memory if it just moves weights.
    other: bytes on the device that are not among the program's arguments.
    times: how often the run executes it; training counts less in later stages, whose model is smaller.
    useful: share of its operations that are needed; the others compute again what was not kept.
  """

  program: Program
  other: int
  times: float = 0.0
  useful: float = 1.0


def programs(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, Planned]:
  """All programs of a run, by title."""
  t, hidden = footprint.options.train, footprint.options.prune.hidden
  with Progress('compiling', 2 + bool(t.tokens) + bool(hidden), 'programs') as progress:
    found: dict[str, Planned] = {}
    if hidden:
      found |= _of_narrowing(footprint)
      progress.update(1)
    found |= _of_pruning(footprint, stages, progress)
    if t.tokens:
      found |= _of_training(footprint, stages)
      progress.update(1)
  return found


def _teacher_beside(footprint: Footprint) -> int:
  """Bytes of a teacher that is on the devices throughout the run."""
  t = footprint.options.train
  if not t.tokens or not t.distill.teacher_beside:
    return 0
  return bytes_of(placed(llama.abstract_params(footprint.whole, footprint.dtype)))


def _of_narrowing(footprint: Footprint) -> dict[str, Planned]:
  options, whole, teacher = footprint.options, footprint.whole, _teacher_beside(footprint)
  rows = options.prune.calibration.samples * options.prune.calibration.length
  stacked = footprint.unnarrowed(whole.num_layers)
  leaves = list(map(bytes_of, jax.tree.leaves(stacked)))
  moved = Program(Memory(bytes_of(footprint.state(whole, False)), max(leaves), sum(leaves)))
  measuring = flops.layers(whole, options.prune.calibration.length) * rows
  fitting = flops.narrowing(options, whole, footprint.config) * rows
  return {
    'stacking, before narrowing': Planned(moved, teacher),
    'moments of the residual stream': Planned(
      _measure(footprint, footprint.stream_moments, measuring), teacher, 1
    ),
    'narrowing': Planned(_measure(footprint, footprint.narrowing, fitting), teacher, 1),
  }


def _of_pruning(footprint: Footprint, stages: list[ModelConfig], progress: Progress) -> dict[str, Planned]:
  options, config, teacher = footprint.options, footprint.config, _teacher_beside(footprint)
  calibration = options.prune.calibration
  rows = calibration.samples * calibration.length
  beside = bytes_of(footprint.state(config, False)) + teacher
  later = bytes_of(footprint.state(stages[0], True)) + teacher

  found: dict[str, Planned] = {}
  if footprint.budget.start > footprint.schedule.targets[-1]:  # else narrowing alone reaches the target
    stacked = footprint.stacked(config)
    largest = max(map(bytes_of, jax.tree.leaves(stacked)))  # leaf by leaf: that of all layers, then stacked
    moved = Program(Memory(beside - teacher, largest, bytes_of(stacked)))
    found['stacking, first stage'] = Planned(moved, teacher)
    scoring = _measure(footprint, footprint.scoring, flops.scoring(options, config) * rows)
    # The unstacked weights are read again after the first stage has been pruned; narrowed ones are kept.
    first = beside if options.prune.hidden else teacher
    title = f'scoring, {calibration.samples} x {calibration.length} tokens, first stage'
    found[title] = Planned(scoring, first, flops.scoring_passes(options, config, footprint.budget))
    if len(stages) > 1:
      found['scoring, second stage'] = Planned(scoring, later)
  progress.update(1)
  if options.prune.compensate != 'none':
    work = flops.compensation(options, config) * rows
    compensation = _measure(footprint, footprint.compensation, work)
    title = f'compensation ({options.prune.compensate})'
    found[title] = Planned(compensation, max(beside, later), len(stages))
    corrected = Memory(compensation.memory.results, 0.0, bytes_of(footprint.state(config, False)))
    found['correction'] = Planned(Program(corrected), max(beside, later))
  # The pruned state and the one before are both held: only weights in the first stage, then moments too.
  cut = [(beside, bytes_of(footprint.state(stages[0], False)))]
  cut += [(later, bytes_of(footprint.state(stages[1], True)))] if len(stages) > 1 else []
  before, after = max(cut, key=sum)
  found['compaction'] = Planned(Program(Memory(before - teacher, 0.0, after)), teacher)
  progress.update(1)
  return found


def _of_training(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, Planned]:
  options, whole, found = footprint.options, footprint.whole, {}
  t, schedule = options.train, footprint.schedule
  if t.distill.kept_ids:
    batch = rows_at_once(t.batch, t.micro_batch) * t.length
    asked = _measure(footprint, footprint.teacher, flops.teacher(options, whole) * batch)
    # At most: rows that come again are not asked again.
    found['teacher, before anything else'] = Planned(asked, 0, t.tokens / batch)
  per_token = [flops.training(options, whole, flops.forward(stage, t.length)) for stage in stages]
  times = sum(
    (schedule.end(k) - schedule.start(k)) * work / per_token[0] for k, work in enumerate(per_token, 1)
  )
  of_batch = per_token[0] * t.batch * t.length
  training = _measure(footprint, lambda depth: footprint.training(stages[0], depth), of_batch)
  once = dataclasses.replace(options, train=dataclasses.replace(t, remat=False))
  useful = flops.training(once, whole, flops.forward(stages[0], t.length)) / per_token[0]
  found[f'training, {t.batch} x {t.length} tokens, first stage'] = Planned(training, 0, times, useful)
  return found


def _measure(footprint: Footprint, measure: Callable[[int], Program], work: float) -> Program:
  """`measure` at the full depth, or extrapolated to it from two (estimate.depths); `work`: its FLOPs."""
  layers, depths = footprint.config.num_layers, footprint.options.estimate.depths
  found = measure(depths[-1] if depths else layers)
  if depths:
    shallow, deep = depths
    found = found.extrapolated(measure(shallow), deep, shallow, layers)
  return dataclasses.replace(found, flops=work / device_count())
