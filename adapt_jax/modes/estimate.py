"""Mode estimate: memory, traffic, time and cost of a run on accelerators, from shapes alone.

No weights, texts or accelerators are needed. `modes.estimate_programs` compiles the run's own programs.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.config.identity import REQUEST
from adapt_jax.config.mode_options import EstimateOptions
from adapt_jax.config.options import RunOptions
from adapt_jax.config.units import duration
from adapt_jax.machine import targets
from adapt_jax.machine.targets import TARGETS, Target
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_config
from adapt_jax.models.network import backend, sharding
from adapt_jax.models.network.backend import CPU, compute_dtype
from adapt_jax.models.network.sharding import device_count
from adapt_jax.modes.estimate_programs import Footprint, Planned, Program, programs, stage_configs
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.checks import check_run
from adapt_jax.pipeline.dense_model import with_output_bias
from adapt_jax.pruning import slicegpt


def prepare(options: EstimateOptions) -> list[Any] | None:
  """The described devices of the target; None if CPU devices are simulated or used.

  Call it before any other use of JAX. Raises InputError.
  """
  target = TARGETS[options.target]
  if target.platform != 'cpu' and not options.devices:
    raise InputError('estimate.devices = 0 needs estimate.target = cpu: name a number of devices')
  if target.platform == 'tpu':
    targets.slice_name(target, options.devices)  # raises InputError
  if target.platform == 'cpu' or targets.missing(target):
    targets.simulate(options.devices)
    return None
  jax.config.update('jax_platforms', 'cpu')
  return targets.devices(target, options.devices)


def run(options: RunOptions) -> None:
  """Mode estimate: prints its tables; writes nothing."""
  config = open_config(options.model.source)
  if options.prune.method == slicegpt.METHOD:
    raise InputError(f'prune.method = {slicegpt.METHOD!r}: mode estimate needs a method that removes groups')
  if options.prune.vocab:
    raise InputError(
      f'prune.vocab = {options.prune.vocab!r} is not for mode estimate, which reads no text: leave it '
      f'empty, for memory and time with the whole vocabulary'
    )
  written = dataclasses.replace(options.export, gguf_types=('auto',))  # by another machine, with llama.cpp
  check_run(dataclasses.replace(options, export=written), config)
  config = with_output_bias(config, options.prune.compensate == 'bias')
  estimate = options.estimate
  if any(depth > config.num_layers for depth in estimate.depths):
    raise InputError(
      f'estimate.depths = {estimate.depths}, but model.source has {config.num_layers} layers: lower them'
    )
  target = _with_overrides(TARGETS[estimate.target], estimate)
  install = targets.missing(target)
  platform = CPU if install else target.compiled_for
  if not estimate.devices:
    platform = backend.platform()  # of this machine's own devices
  dtype = compute_dtype(options.model.dtype)
  if options.model.dtype == 'auto' and estimate.devices:
    dtype = jnp.dtype(jnp.bfloat16)  # the value of auto on the planned devices
  if install:
    print(f'estimate.target = {estimate.target}: its compiler is not installed; {install} installs it')
  stages = stage_configs(options, config)
  start = time.monotonic()
  footprint = Footprint(options, config, dtype, platform)
  found = programs(footprint, stages)
  compiler = 'simulated CPU devices' if platform.name == 'cpu' else estimate.target
  if not estimate.devices:
    compiler = "this machine's devices"
  print(
    f'{options.model.source}: {count_params(config):,} parameters on {_devices()} devices '
    f'({_mesh_text()}), products in {dtype.name}; compiled for {compiler} in {time.monotonic() - start:.0f} s'
  )
  if estimate.depths:
    print(f'extrapolated to {config.num_layers} layers from {" and ".join(map(str, estimate.depths))}')
  print('\n'.join(_memory_table(found, target)))
  if platform.name != 'cpu':
    print('\n'.join(_limit_table(found, target)))
    print('\n'.join(_collectives_table(found)))
  print('\n'.join(_stage_table(footprint, stages, target)))
  print(_total(found, target, estimate.price, traffic=platform.name != 'cpu'))


def _with_overrides(target: Target, options: EstimateOptions) -> Target:
  return dataclasses.replace(
    target,
    memory_gb=options.device_memory_gb or target.memory_gb,
    peak_tflops=options.peak_tflops or target.peak_tflops,
  )


def _devices() -> int:
  return device_count() if sharding.mesh() else jax.device_count()


def _mesh_text() -> str:
  sizes = jax.sharding.get_abstract_mesh().shape
  return ', '.join(f'{axis} {size}' for axis, size in sizes.items()) if sizes else 'no mesh'


def _memory_table(found: dict[str, Planned], target: Target) -> list[str]:
  lines = [
    '',
    '| GB per device | arguments | temporary | results | other | total |',
    '|---|---|---|---|---|---|',
  ]
  for title, planned in found.items():
    memory = planned.program.memory
    sizes = [memory.arguments, memory.temporary, memory.results, planned.other, memory.total + planned.other]
    lines.append(f'| {title} | ' + ' | '.join(f'{size / 1e9:.2f}' for size in sizes) + ' |')
  peak = max(planned.program.memory.total + planned.other for planned in found.values()) / 1e9
  fits = 'fits' if peak < target.memory_gb else 'DOES NOT FIT'
  return [*lines, '', f'peak {peak:.1f} GB of {target.memory_gb:g} GB per device: {fits}']


@dataclasses.dataclass(frozen=True)
class Limit:
  """Seconds that one device needs at its published peaks for products, its memory, and sending."""

  products: float
  memory: float
  network: float

  @property
  def shortest(self) -> float:
    """If all three overlap entirely."""
    return max(self.products, self.memory, self.network)

  @property
  def longest(self) -> float:
    """If none overlap."""
    return self.products + self.memory + self.network


def limit(program: Program, target: Target) -> Limit:
  """The roofline of a program (Williams et al., 10.1145/1498765.1498785), with the network too."""
  return Limit(
    program.flops / (target.peak_tflops * 1e12),
    program.moved / (target.memory_gb_per_s * 1e9),
    sum(program.sent.values()) / (target.link_gb_per_s * 1e9),
  )


def _limit_table(found: dict[str, Planned], target: Target) -> list[str]:
  lines = [
    '',
    f'Seconds at the published peaks of {target.peak_tflops:g} TFLOP/s, {target.memory_gb_per_s:g} GB/s of '
    f'memory and {target.link_gb_per_s:g} GB/s sent:',
    '',
    '| a device, one execution | TFLOP | GB read and written | GB sent | products | memory | network | MFU |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for title, planned in found.items():
    if not (program := planned.program).flops:
      continue
    at = limit(program, target)
    sent = sum(program.sent.values())
    needed = planned.useful * at.products
    mfu = f'{needed / at.longest:.0%} to {needed / at.shortest:.0%}'
    lines.append(
      f'| {title} | {program.flops / 1e12:.3g} | {program.moved / 1e9:.3g} | {sent / 1e9:.3g} | '
      f'{at.products:.3g} | {at.memory:.3g} | {at.network:.3g} | {mfu} |'
    )
  return lines


def _collectives_table(found: dict[str, Planned]) -> list[str]:
  rows = [
    f'| {title} | {kind} | {planned.program.operations[kind]:,.0f} | {size / 1e9:.3g} |'
    for title, planned in found.items()
    for kind, size in sorted(planned.program.sent.items(), key=lambda x: -x[1])
    if size >= 1e6
  ]
  return ['', '| collectives of | kind | operations | GB |', '|---|---|---|---|', *rows] if rows else []


def _stage_table(footprint: Footprint, stages: list[ModelConfig], target: Target) -> list[str]:
  rate, options, dense = target.peak_tflops * 1e12 * _devices(), footprint.options, footprint.whole
  calibration, t, schedule = options.prune.calibration, options.train, footprint.schedule
  scoring = flops.scoring(options, footprint.config)
  passed = scoring * calibration.samples * calibration.length
  lines = [
    '',
    f'a scoring pass: {scoring / 1e9:.1f} GFLOP per token, {passed / rate:.2f} s at '
    f'{target.peak_tflops:g} TFLOP/s per device',
    '',
    '| stage | parameters | of dense | GFLOP per token | tokens | time at peak |',
    '|---|---|---|---|---|---|',
  ]
  for k, config in enumerate(stages):
    tokens = (schedule.end(k + 1) - schedule.start(k + 1)) * t.batch * t.length
    work = flops.training(options, dense, flops.forward(config, t.length))
    share = count_params(config) / count_params(dense)
    lines.append(
      f'| {k + 1} | {count_params(config):,} | {share:.1%} | {work / 1e9:.1f} | {tokens:,} | '
      f'{duration(tokens * work / rate)} |'
    )
  return lines


def _total(found: dict[str, Planned], target: Target, price: float, traffic: bool) -> str:
  """The last line: time and cost of the whole run; without `traffic` by its products alone."""
  limits = [(limit(planned.program, target), planned.times) for planned in found.values() if planned.times]

  def whole(bound: Callable[[Limit], float]) -> float:
    return sum(times * bound(at) for at, times in limits)

  if traffic:
    seconds = [whole(lambda at: at.shortest), whole(lambda at: at.longest)]
  else:
    seconds = [whole(lambda at: at.products)]
  hours = [_devices() * x / 3600 for x in seconds]
  text = f'\nthe whole run at these peaks: {" to ".join(f"{x:.3g}" for x in hours)} device-hours, '
  text += ' to '.join(map(duration, seconds))
  if price:
    text += f', costs {" to ".join(f"{x * price:,.2f}" for x in hours)}'
  return text + ('' if traffic else ', for products alone')


MODE = Mode(
  'estimate',
  'estimate memory, traffic, time and cost of a run from shapes alone',
  lambda options, prompts: run(options),
  reads=('model', 'prune', 'train', 'estimate', 'mesh', 'export.dtype', *REQUEST),
  devices=lambda options: prepare(options.estimate),
)
