"""Mode plan: memory and time of a run on a mesh, from shapes alone: no weights, texts or accelerators.

XLA compiles the scoring, compensation and training programs for as many simulated CPU devices as the mesh
has, in the dtypes of the run, and its own memory analysis is printed. Three passes of the CPU backend are
disabled, since their effects are those of a CPU: it computes in fp32 and converts the bf16 weights of all
layers before the loop over layers; it combines the all-reduces of all gradients into one, which needs all
gradients at once; and it removes the barriers that make it recompute a layer instead of keeping it. fp32
copies of arrays in use remain. With plan.devices = 0, programs are compiled for the available devices; if
these are accelerators, no pass is disabled. Operations always have the form for accelerators.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.options import RunOptions
from adapt_jax.machine import mesh
from adapt_jax.machine.mesh import rows_at_once
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import LayerShape, ModelConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_config
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import compute_dtype, made_for
from adapt_jax.models.network.sharding import placed, row_sharding
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.checks import check_run
from adapt_jax.pipeline.dense_model import with_output_bias
from adapt_jax.pipeline.forecast import duration
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pruning import programs as pruning_programs
from adapt_jax.pruning import slicegpt, surgery
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.widths import Allocator, Widths
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import batch_shapes, make_step
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

  def extrapolated(self, shallow: 'Memory', depth: int, shallow_depth: int, layers: int) -> 'Memory':
    """Extrapolates to `layers` from this one at `depth` and a shallower one: all is linear in the depth."""
    steps = (layers - depth) / (depth - shallow_depth)
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(shallow), strict=True)
    return Memory(*(deep + steps * (deep - less) for deep, less in pairs))


def simulate(devices: int) -> None:
  """Makes JAX see only so many CPU devices (0: the actual devices); call it before any other use of JAX."""
  if devices:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', devices)


def compiled_memory(fn: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()) -> Memory:
  """Memory that the compiler plans for `fn` on `args` (of `jax.ShapeDtypeStruct`)."""
  options = {'xla_disable_hlo_passes': _NOT_ON_CPU} if jax.default_backend() == 'cpu' else {}

  def traced_anew(*args: Any) -> Any:  # not a trace that JAX may have made for a CPU
    return fn(*args)

  with made_for('gpu'):
    lowered = mesh.jit(traced_anew, *args, donate_argnums=donate_argnums).lower(*args)
  found: Any = lowered.compile(compiler_options=options).memory_analysis()
  fresh = found.output_size_in_bytes - found.alias_size_in_bytes
  return Memory(found.argument_size_in_bytes, found.temp_size_in_bytes, fresh)


def bytes_of(tree: Any) -> int:
  """Bytes that a tree of `jax.ShapeDtypeStruct` with shardings takes on one device."""

  def size(x: Any) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return int(np.prod(shape, dtype=np.int64)) * x.dtype.itemsize

  return sum(size(x) for x in jax.tree.leaves(tree))


def stage_configs(options: RunOptions, config: ModelConfig) -> list[ModelConfig]:
  """The model after each stage if all layers were pruned equally; in a run, scores make them differ."""
  prune = options.prune
  allocator = Allocator(config, prune.align_ffn, prune.align_kv)
  widths, found = allocator.full, []
  for target in Schedule.of(options, config).targets:
    widths = allocator.one_shot(widths, np.ones(config.num_layers), target)
    found.append(config.with_layers(_shapes(config, widths)))
  return found


def _shapes(config: ModelConfig, widths: Widths) -> tuple[LayerShape, ...]:
  return tuple(
    LayerShape(int(k) * s.group_size, int(k), int(f))
    for s, k, f in zip(config.layers, widths.kv, widths.ffn, strict=True)
  )


class Footprint:
  """Memory and FLOPs of the programs of a run.

  Args:
    options: checked options.
    config: of the dense model.
    dtype: of activations and products.
  """

  def __init__(self, options: RunOptions, config: ModelConfig, dtype: Any):
    self.options, self.config, self.dtype = options, config, dtype
    self._optimizer = optimizer(options.train, Schedule.of(options, config).train_steps)

  def state(self, config: ModelConfig, moments: bool) -> Any:
    """Arrays on the devices throughout a stage: weights (fp32 if trained) and, if `moments`, Adam's."""
    dtype = jnp.float32 if self.options.train.tokens else self.dtype
    params = llama.abstract_params(config, dtype)
    if not self.options.train.tokens or not moments:
      return placed({'params': params})
    return placed({'params': params, 'optimizer': jax.eval_shape(self._optimizer.init, params)})

  def stacked(self, config: ModelConfig) -> Any:
    """The input of scoring and compensation: all layers' weights at their original widths."""
    params = llama.abstract_params(config)
    plan = PrunePlan.dense(config)
    return placed(jax.eval_shape(lambda p: surgery.stack(p, plan, self.dtype), params))

  def scoring(self, layers: int) -> Memory:
    """Memory of one scoring pass with this many layers."""
    config, prune = self.config.with_layers(self.config.layers[:layers]), self.options.prune
    scorer = pruning_programs.scoring(config, prune, self.dtype)
    tokens = pruning_programs.calibration_tokens(prune.calibration)
    return compiled_memory(scorer, self.stacked(config), tokens)

  def compensation(self, layers: int) -> Memory:
    """Memory of the least squares or biases after the last step of a stage."""
    config, prune = self.config.with_layers(self.config.layers[:layers]), self.options.prune
    program = pruning_programs.compensation(config, prune, self.dtype)
    masks = tuple(
      jax.ShapeDtypeStruct(m.shape, m.dtype) for m in surgery.padded_masks(PrunePlan.dense(config))
    )
    tokens = pruning_programs.calibration_tokens(prune.calibration)
    return compiled_memory(program, self.stacked(config), masks, tokens)

  def training(self, config: ModelConfig, layers: int) -> Memory:
    """Memory of one optimizer step of a stage with this model, including the teacher."""
    t = self.options.train
    config = config.with_layers(config.layers[:layers])
    dense = self.config.with_layers(self.config.layers[:layers]) if t.distill.teacher_beside else None
    teacher = [placed(llama.abstract_params(dense, self.dtype))] if dense else []
    step = make_step(config, t, self._optimizer, self.dtype, dense)
    return compiled_memory(step, self.state(config, True), batch_shapes(t), *teacher, donate_argnums=(0,))

  def teacher(self, layers: int) -> Memory:
    """Memory of computing the teacher's cached predictions, with distill.cache."""
    t, config = self.options.train, self.config.with_layers(self.config.layers[:layers])
    params = placed(llama.abstract_params(config, self.dtype))
    shape = (rows_at_once(t.batch, t.micro_batch), t.length)
    rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=row_sharding())
    return compiled_memory(likeliest(config, t, self.dtype), params, rows, rows)


def _measure(options: RunOptions, layers: int, measure: Callable[[int], Memory]) -> Memory:
  """`measure` at the full depth, or extrapolated to it from two depths (plan.depths)."""
  if not options.plan.depths:
    return measure(layers)
  shallow, deep = options.plan.depths
  return measure(deep).extrapolated(measure(shallow), deep, shallow, layers)


def programs(footprint: Footprint, stages: list[ModelConfig]) -> dict[str, tuple[Memory, int]]:
  """By title, the memory that the compiler plans for each program, and bytes of other arrays held."""
  options, config = footprint.options, footprint.config
  layers, calibration, t = config.num_layers, options.prune.calibration, options.train
  teacher = 0
  if t.tokens and t.distill.teacher_beside:
    teacher = bytes_of(placed(llama.abstract_params(config, footprint.dtype)))
  beside = bytes_of(footprint.state(config, False)) + teacher
  later = bytes_of(footprint.state(stages[0], True)) + teacher
  # The pruned state and the one before are both held: only weights in the first stage, then moments too.
  cut = [(beside, bytes_of(footprint.state(stages[0], False)))]
  cut += [(later, bytes_of(footprint.state(stages[1], True)))] if len(stages) > 1 else []
  found = {}
  size = f'{calibration.samples} x {calibration.length}'
  with Progress('plan', 2 + bool(t.tokens), 'programs') as progress:
    stacked = footprint.stacked(config)
    largest = max(map(bytes_of, jax.tree.leaves(stacked)))  # leaf by leaf: that of all layers, then stacked
    found['stacking, first stage'] = Memory(beside - teacher, largest, bytes_of(stacked)), teacher
    scoring = _measure(options, layers, footprint.scoring)
    # The unstacked weights are read again after the first stage has been pruned.
    found[f'scoring, {size} tokens, first stage'] = scoring, teacher
    if len(stages) > 1:
      found['scoring, second stage'] = scoring, later
    progress.update(1)
    if options.prune.compensate != 'none':
      compensation = _measure(options, layers, footprint.compensation)
      found[f'compensation ({options.prune.compensate})'] = compensation, max(beside, later)
      corrected = bytes_of(footprint.state(config, False))
      found['correction'] = Memory(compensation.results, 0.0, corrected), max(beside, later)
    before, after = max(cut, key=sum)
    found['compaction'] = Memory(before - teacher, 0.0, after), teacher
    progress.update(1)
    if t.tokens and t.distill.kept_ids:
      found['teacher, before anything else'] = _measure(options, layers, footprint.teacher), 0
    if t.tokens:
      name = f'training, {t.batch} x {t.length} tokens, first stage'
      found[name] = _measure(options, layers, lambda depth: footprint.training(stages[0], depth)), 0
      progress.update(1)
  return found


def run(options: RunOptions) -> None:
  """Mode plan: prints bytes per device, FLOPs per token, parameters and time by stage; writes nothing."""
  config = open_config(options.model.source)
  if options.prune.method == slicegpt.METHOD:
    raise InputError(
      f'config.prune.method = {slicegpt.METHOD!r}: mode plan needs a method that removes groups'
    )
  check_run(options, config)
  config = with_output_bias(config, options.prune.compensate == 'bias')
  dtype = compute_dtype(options.model.dtype)
  if options.model.dtype == 'auto' and options.plan.devices:
    dtype = jnp.dtype(jnp.bfloat16)  # the value of auto on the planned devices
  if any(depth > config.num_layers for depth in options.plan.depths):
    raise InputError(
      f'config.plan.depths = {options.plan.depths}, but model.source has {config.num_layers} layers: '
      f'lower them'
    )
  footprint = Footprint(options, config, dtype)
  stages = stage_configs(options, config)
  start = time.monotonic()
  found = programs(footprint, stages)
  print(
    f'{options.model.source}: {count_params(config):,} parameters on {jax.device_count()} devices '
    f'({_mesh_text()}), products in {dtype.name}; compiled in {time.monotonic() - start:.0f} s'
  )
  if options.plan.depths:
    print(f'extrapolated to {config.num_layers} layers from {" and ".join(map(str, options.plan.depths))}')
  print('\n'.join(_memory_table(options, found)))
  print('\n'.join(_stage_table(footprint, stages)))


def _mesh_text() -> str:
  sizes = jax.sharding.get_abstract_mesh().shape
  return ', '.join(f'{axis} {size}' for axis, size in sizes.items()) if sizes else 'no mesh'


def _memory_table(options: RunOptions, found: dict[str, tuple[Memory, int]]) -> list[str]:
  lines = [
    '',
    '| GB per device | arguments | temporary | results | other | total |',
    '|---|---|---|---|---|---|',
  ]
  for title, (memory, beside) in found.items():
    sizes = [memory.arguments, memory.temporary, memory.results, beside, memory.total + beside]
    lines.append(f'| {title} | ' + ' | '.join(f'{size / 1e9:.2f}' for size in sizes) + ' |')
  peak = max(memory.total + beside for memory, beside in found.values()) / 1e9
  have = options.plan.device_memory_gb
  return [
    *lines,
    '',
    f'peak {peak:.1f} GB of {have:g} GB per device: {"fits" if peak < have else "DOES NOT FIT"}',
  ]


def _stage_table(footprint: Footprint, stages: list[ModelConfig]) -> list[str]:
  options, devices = footprint.options, jax.device_count()
  rate = options.plan.peak_tflops * 1e12 * devices
  calibration, t = options.prune.calibration, options.train
  scoring = flops.scoring(options, footprint.config)
  passed = scoring * calibration.samples * calibration.length
  lines = [
    f'a scoring pass: {scoring / 1e9:.1f} GFLOP per token, {passed / rate:.2f} s at '
    f'{options.plan.peak_tflops:g} TFLOP/s per device',
    '',
    '| stage | parameters | of dense | GFLOP per token | tokens | time at peak |',
    '|---|---|---|---|---|---|',
  ]
  schedule = Schedule.of(options, footprint.config)
  for k, config in enumerate(stages):
    tokens = (schedule.end(k + 1) - schedule.start(k + 1)) * t.batch * t.length
    work = flops.training(options, footprint.config, flops.forward(config, t.length))
    share = count_params(config) / count_params(footprint.config)
    lines.append(
      f'| {k + 1} | {count_params(config):,} | {share:.1%} | {work / 1e9:.1f} | {tokens:,} | '
      f'{duration(tokens * work / rate)} |'
    )
  return lines
