"""The programs of a run, compiled from shapes alone: memory of all, and what they compute, read and send.

Programs are compiled by the compiler of the target (`machine.targets`), if it is installed, and otherwise for
as many simulated CPU devices as the mesh has. For these, three passes of the CPU backend are disabled, since
their effects are those of a CPU: it computes in fp32 and converts the bf16 weights of all layers before the
loop over layers; it combines the all-reduces of all gradients into one, which needs all gradients at once;
and it removes the barriers that make it recompute a layer instead of keeping it. fp32 copies of arrays in use
remain, and operations have the form for accelerators. With devices = 0 on a CPU, programs are compiled as
runs compile them there; but scoring and correction, which one CPU runs layer by layer, are one program each.
"""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.options import RunOptions, TrainOptions
from adapt_jax.machine import mesh
from adapt_jax.machine.compiled_text import CompiledText, Kernel
from adapt_jax.machine.mesh import bytes_of, rows_at_once
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import Platform, compiler_options, loop_options, made_for
from adapt_jax.models.network.sharding import device_count, placed, row_sharding, row_shards
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pipeline.stages import trained
from adapt_jax.pruning import programs as pruning_programs
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.widths import Allocator
from adapt_jax.training import remat
from adapt_jax.training.healing import heal_options
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep, batch_shapes
from adapt_jax.training.teacher_cache import likeliest

# CPU devices that simulate accelerators, and disabled passes of the CPU backend, see above.
SIMULATED = Platform('gpu')
_NOT_ON_CPU = 'while-loop-invariant-code-motion,cpu-all-reduce-combiner,cse_barrier_expander'


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of a run, on one device.

  Attributes:
    arguments, temporary, results: bytes; results that replace an argument do not count. The compiler plans
      them, or they follow from shapes if the program only moves weights.
    other: bytes on the device that are not among the program's arguments.
    flops: floating-point operations (`pipeline.flops`).
    moved: bytes that its operations read from and write to the device's memory.
    sent: bytes that the device sends.
    kernels: what it executes one after another.
    remat: of a training step, whether it recomputes whole layers. at_once: the rows of a device at once.
    times: how often the run executes it; training counts less in later stages, whose model is smaller.
  """

  arguments: int
  temporary: int
  results: int
  other: int = 0
  flops: float = 0.0
  moved: float = 0.0
  sent: float = 0.0
  kernels: tuple[Kernel, ...] = ()
  remat: bool = False
  at_once: int = 0
  times: float = 0.0

  @property
  def total(self) -> int:
    """The memory that must be free."""
    return self.arguments + self.temporary + self.results + self.other


def compile_for(
  platform: Platform,
  fn: Callable[..., Any],
  *args: Any,
  donate_argnums: tuple[int, ...] = (),
  loops: bool = False,
) -> Program:
  """`fn` compiled for `args` (of `jax.ShapeDtypeStruct`) on the devices of the current mesh.

  platform: of these devices, or SIMULATED. loops: whether a run compiles it with `loop_options`.
  """
  options = {'xla_disable_hlo_passes': _NOT_ON_CPU} if platform == SIMULATED else {}
  if platform.name == 'cpu':
    options = compiler_options() | (loop_options() if loops else {})

  def traced_anew(*args: Any) -> Any:  # not a trace that JAX may have made for a CPU
    return fn(*args)

  with made_for(platform.name, platform.capability):
    lowered = mesh.jit(traced_anew, *args, donate_argnums=donate_argnums).lower(*args)
  compiled = lowered.compile(compiler_options=options)
  memory: Any = compiled.memory_analysis()
  text = CompiledText(compiled.as_text())
  return Program(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    memory.output_size_in_bytes - memory.alias_size_in_bytes,
    moved=text.bytes_moved(),
    sent=sum(x.sent * x.times for x in text.collectives()),
    kernels=tuple(text.kernels()),
  )


def stage_configs(options: RunOptions, config: ModelConfig) -> list[ModelConfig]:
  """The model after each stage if all layers were pruned equally; in a run, scores make them differ."""
  prune, budget = options.prune, budget_of(options, config)
  allocator = Allocator(config, prune.multiples.ffn, prune.multiples.kv, budget=budget)
  widths, stages = allocator.full, list[ModelConfig]()
  for target in Schedule.of(options, budget).targets:
    widths = allocator.one_shot(widths, np.ones(config.num_layers), target)
    rows = zip(config.layers, widths.kv, widths.ffn, strict=True)
    stages.append(config.with_layers(tuple(budget.removes.narrowed(s, int(k), int(f)) for s, k, f in rows)))
  return stages


class Footprint:
  """Compiles the programs of a run.

  Args:
    options: checked options.
    config: of the dense model. teacher: of the teacher; the same by default.
    dtype: of activations and products; in training, if train.dtype is auto.
    platform: of the devices of the current mesh, or SIMULATED.
    memory: bytes of a device, by which train.remat and train.micro_batch are chosen where they are open; 0:
      without remat, and 8 rows at once.
  """

  def __init__(
    self,
    options: RunOptions,
    config: ModelConfig,
    dtype: Any,
    platform: Platform = SIMULATED,
    teacher: ModelConfig | None = None,
    memory: float = 0,
  ):
    self.options, self.config, self.dtype, self.platform = options, config, dtype, platform
    self.memory, self._steps = memory, dict[ModelConfig, Program]()
    self._training_dtype = dtype if options.train.dtype == 'auto' else jnp.dtype(options.train.dtype)
    self.teacher_config = teacher or config
    self.budget = budget_of(options, config)
    self.schedule = Schedule.of(options, self.budget)
    self._calibration = options.prune.calibration
    self._tokens = pruning_programs.calibration_tokens(self._calibration)
    train = dataclasses.replace(options.train, lr=1e-4, min_lr=1e-5)  # the weights are not read
    self._optimizer = optimizer(train, self.schedule.train_steps)

  @property
  def teacher_beside(self) -> int:
    """Bytes of a teacher that is on the devices throughout the run."""
    t = self.options.train
    if not t.tokens or not t.distill.teacher_beside:
      return 0
    return bytes_of(placed(llama.abstract_params(self.teacher_config, self._training_dtype)))

  def state(self, config: ModelConfig, moments: bool) -> Any:
    """Arrays on the devices throughout a stage: weights (fp32 if trained) and, if `moments`, Adam's."""
    params = llama.abstract_params(config, jnp.float32 if trained(self.options) else self.dtype)
    if not self.options.train.tokens or not moments:
      return placed({'params': params})
    return placed({'params': params, 'optimizer': jax.eval_shape(self._optimizer.init, params)})

  def stacked(self) -> Any:
    """The input of scoring and compensation: all layers' weights at their original widths."""
    params = llama.abstract_params(self.config)
    plan = PrunePlan.dense(self.config, self.budget.removes)
    return placed(jax.eval_shape(lambda p: surgery.stack(p, plan, self.dtype), params))

  def _compiled(
    self, tokens: int, flops_per_token: float, fn: Callable[..., Any], *args: Any, **more: Any
  ) -> Program:
    program = compile_for(self.platform, fn, *args, **more)
    return dataclasses.replace(program, flops=tokens * flops_per_token / device_count())

  def _calibrated(self, flops_per_token: float, make: Callable[..., Any], *args: Any) -> Program:
    """A program of pruning, whose last argument is the calibration rows."""
    tokens = self._calibration.samples * self._calibration.length
    fn = make(self.config, self.options.prune, self.dtype, self.budget.removes)
    return self._compiled(tokens, flops_per_token, fn, self.stacked(), *args, self._tokens, loops=True)

  def scoring(self) -> Program:
    """One scoring pass."""
    return self._calibrated(flops.scoring(self.options, self.config), pruning_programs.scoring)

  def compensation(self) -> Program:
    """The least squares or biases after the last step of a stage."""
    plan, work = (
      PrunePlan.dense(self.config, self.budget.removes),
      flops.compensation(self.options, self.config),
    )
    masks = tuple(jax.ShapeDtypeStruct(m.shape, m.dtype) for m in surgery.padded_masks(plan))
    return self._calibrated(work, pruning_programs.compensation, masks)

  def training(self, config: ModelConfig, other: int = 0) -> Program:
    """One optimizer step of a stage with this model, including the teacher, beside `other` bytes."""
    t = self.options.train
    dense = self.teacher_config if t.distill.teacher_beside else None
    teacher = [placed(llama.abstract_params(dense, self._training_dtype))] if dense else []
    args = self.state(config, True), batch_shapes(t), *teacher

    def compile(t: TrainOptions) -> Program:
      step, again = TrainingStep(config, t, self._optimizer, self._training_dtype, dense), t.remat == 'True'
      work = self.step_work(config, again)
      program = self._compiled(t.batch * t.length, work, step, *args, donate_argnums=(0,))
      rows = rows_at_once(t.batch, t.at_once) // row_shards()
      return dataclasses.replace(program, remat=again, at_once=rows, other=other)

    def likely(t: TrainOptions) -> bool:
      with made_for(self.platform.name, self.platform.capability):
        size = remat.expected(config, t, self._training_dtype, bytes_of(args) + other)
      return remat.fits(size, self.memory)

    if config not in self._steps:
      fit = lambda x: remat.fits(x.total, self.memory)  # noqa: E731
      self._steps[config] = remat.chosen(t, compile, fit, likely if self.memory else None)[1]
    return self._steps[config]

  def remat(self, stages: list[ModelConfig]) -> list[bool]:
    """Whether each stage's step recomputes whole layers: models shrink, so once one fits, later ones do."""
    t = self.options.train
    if t.remat != 'auto' or not t.tokens or not self.training(stages[0]).remat:
      return [t.remat == 'True'] * len(stages)
    first = bisect.bisect_left(stages, True, key=lambda config: not self.training(config).remat)
    return [k < first for k in range(len(stages))]

  def step_work(self, config: ModelConfig, again: bool) -> float:
    """FLOPs per token of a training step of this model, including the teacher's; again: with remat."""
    return flops.training(self.options, self.teacher_config, config, again)

  def teacher(self) -> Program:
    """Computing the teacher's cached predictions, with distill.cache."""
    t = self.options.train
    params = placed(llama.abstract_params(self.teacher_config, self._training_dtype))
    shape = (rows_at_once(t.batch, t.at_once), t.length)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding())
    work = flops.teacher(self.options, self.teacher_config)
    ask = likeliest(self.teacher_config, t, self._training_dtype)
    program = self._compiled(rows.size, work, ask, params, rows, rows)
    return dataclasses.replace(program, times=t.tokens / rows.size)  # at most: rows that come again are kept


def programs(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, Program]:
  """All programs of a run, by title."""
  t = footprint.options.train
  parts = [_of_scoring, _of_correction]
  parts += ([_of_healing] if footprint.options.prune.heal else []) + ([_of_training] if t.tokens else [])
  planned: dict[str, Program] = {}
  with Progress('compiling', len(parts), 'programs') as progress:
    for part in parts:
      planned |= part(footprint, stages)
      progress.update(1)
  return planned


def _of_scoring(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, Program]:
  options, teacher, budget = footprint.options, footprint.teacher_beside, footprint.budget
  if budget.dense <= footprint.schedule.targets[-1]:
    return {}
  weights = bytes_of(footprint.state(footprint.config, False))
  leaves = [*map(bytes_of, jax.tree.leaves(footprint.stacked()))]  # leaf by leaf: of all layers, then stacked
  scoring, c = footprint.scoring(), options.prune.calibration
  times = flops.scoring_passes(options, footprint.config, budget)
  planned = {
    'stacking, first stage': Program(weights, max(leaves), sum(leaves), teacher),
    f'scoring, {c.samples} x {c.length} tokens, first stage': dataclasses.replace(
      scoring, other=teacher, times=times
    ),
  }
  if len(stages) > 1:
    later = teacher + bytes_of(footprint.state(stages[0], True))
    planned['scoring, second stage'] = dataclasses.replace(scoring, other=later)
  return planned


def _of_correction(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, Program]:
  teacher, compensate = footprint.teacher_beside, footprint.options.prune.compensate
  weights, trained = (bytes_of(footprint.state(*x)) for x in ((footprint.config, False), (stages[0], True)))
  planned = {}
  if compensate != 'none':
    other = teacher + (max(weights, trained) if len(stages) > 1 else weights)  # later stages have moments
    program = dataclasses.replace(footprint.compensation(), other=other, times=len(stages))
    planned[f'compensation ({compensate})'] = program
    planned['correction'] = Program(program.results, 0, weights, other)
  # The pruned state and the one before are both held: only weights in the first stage, then moments too.
  cut = [(weights, bytes_of(footprint.state(stages[0], False)))]
  cut += [(trained, bytes_of(footprint.state(stages[1], True)))] if len(stages) > 1 else []
  before, after = max(cut, key=sum)
  return planned | {'compaction': Program(before, 0, after, teacher)}


def _of_healing(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, Program]:
  options, other, c = footprint.options, footprint.teacher_beside, footprint.options.prune.calibration
  if len(stages) > 1:  # the moments of recovery
    with_moments, without = (bytes_of(footprint.state(stages[-1], moments)) for moments in (True, False))
    other += with_moments - without
  moments, vocab_size = options.train.moments_dtype, footprint.config.vocab_size
  t = heal_options(c.samples, c.length, options.prune.heal, c.batch, vocab_size, moments)
  t = dataclasses.replace(t, dtype=options.train.dtype)
  of_heal = Footprint(
    dataclasses.replace(options, train=t),
    footprint.config,
    footprint.dtype,
    footprint.platform,
    memory=footprint.memory,
  )
  asked, healing = of_heal.teacher(), of_heal.training(stages[-1], other)
  asked = dataclasses.replace(asked, other=other, times=c.samples * c.length * asked.times / t.tokens)
  healing = dataclasses.replace(healing, times=t.tokens / (t.batch * t.length))
  return {'teacher, on calibration rows': asked, f'healing, {t.batch} x {t.length} tokens': healing}


def _of_training(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, Program]:
  t, schedule = footprint.options.train, footprint.schedule
  kept = {'teacher, before anything else': footprint.teacher()} if t.distill.kept_ids else {}
  per_token = [footprint.step_work(*x) for x in zip(stages, footprint.remat(stages), strict=True)]
  times = sum(
    (schedule.end(k) - schedule.start(k)) * work / per_token[0] for k, work in enumerate(per_token, 1)
  )
  training = dataclasses.replace(footprint.training(stages[0]), times=times)
  title = f'training, {t.batch} x {t.length} tokens, {training.at_once} rows at once, first stage'
  return kept | {title: training}
