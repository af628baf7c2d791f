"""Mode estimate: memory, traffic, time and cost of a run on accelerators, from shapes alone.

No weights, texts or accelerators are needed. `modes.estimate_programs` compiles the run's own programs.
"""

import dataclasses
import math
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adapt_jax.config.identity import REQUEST
from adapt_jax.config.mode_options import EstimateOptions
from adapt_jax.config.options import RunOptions
from adapt_jax.config.units import duration
from adapt_jax.machine import memory, targets
from adapt_jax.machine.targets import TARGETS, Target
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_config
from adapt_jax.models.network import backend, sharding
from adapt_jax.models.network.backend import CPU, compute_dtype
from adapt_jax.models.network.matmul import product
from adapt_jax.models.network.sharding import device_count
from adapt_jax.modes.estimate_programs import SIMULATED, Footprint, Program, programs, stage_configs
from adapt_jax.modes.mode import Mode
from adapt_jax.modes.sizes import of_each
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.checks import check_run
from adapt_jax.pipeline.dense_model import with_output_bias
from adapt_jax.pruning import slicegpt
from adapt_jax.reports.table import Table
from adapt_jax.training import remat
from adapt_jax.training.precision import chosen

_SHARE = 0.92  # of a device's memory that JAX may use: XLA_CLIENT_MEM_FRACTION in the launch files


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
  config = _checked_config(options)
  estimate, target = options.estimate, TARGETS[options.estimate.target]
  install = targets.missing(target)
  platform, compiler = target.compiled_for, estimate.target
  if install or platform == CPU:
    platform, compiler = SIMULATED, 'simulated CPU devices'
  dtype = compute_dtype(options.model.dtype)
  if not estimate.devices:
    platform, compiler = backend.platform(), "this machine's devices"
    if platform == CPU:
      taken = chosen(options.training_dtype)
      options = dataclasses.replace(options, train=dataclasses.replace(options.train, dtype=taken))
      target = _this_cpu([dtype, jnp.dtype(taken)])
  elif options.model.dtype == 'auto':
    dtype = jnp.dtype(jnp.bfloat16)  # the value of auto on the planned devices
  if install:
    print(f'estimate.target = {estimate.target}: its compiler is not installed; {install} installs it')
  start, planned, stages = time.monotonic(), dict[str, Program](), list[list[str]]()
  named = options.train.distill.source
  teacher = open_config(named, 'train.distill.source') if named else config
  available = target.memory_gb * 1e9 * _SHARE if estimate.devices else remat.memory()
  for of_size in (every := of_each(options)):
    configs, size = stage_configs(of_size, config), f'{of_size.prune.target}: ' if len(every) > 1 else ''
    footprint = Footprint(of_size, config, dtype, platform, teacher, available)
    for title, program in programs(footprint, configs).items():
      shared = bool(planned) and title.startswith('scoring')  # the sizes share the pass over the dense model
      planned[f'{size}{title}'] = dataclasses.replace(program, times=0) if shared else program
    stages += _stage_rows(footprint, configs, target, size)
  axes = [f'{axis} {size}' for axis, size in jax.sharding.get_abstract_mesh().shape.items()]
  print(
    f'{options.model.source}: {count_params(config):,} parameters on {_devices()} devices '
    f'({", ".join(axes) or "no mesh"}), products in {dtype.name}; compiled for {compiler} in '
    f'{time.monotonic() - start:.0f} s'
  )
  traffic = platform not in (SIMULATED, CPU)
  lines = _memory_table(planned, target) + (_limit_table(planned, target) if traffic else [])
  print('\n'.join(lines + _stage_table(footprint, stages, target)))
  print(_total(planned, target, estimate.price, traffic))


def _this_cpu(dtypes: list[jnp.dtype]) -> Target:
  """This machine: its memory, and the rate of a product, measured in the faster dtype; others are unknown."""
  rate = max(map(_tflops, dtypes))
  return Target('cpu', round(memory.total() / 1e9, 1), float(f'{rate:.2g}'), rate, math.inf, math.inf)


def _tflops(dtype: jnp.dtype) -> float:
  """The rate of a large product of `dtype` on this machine."""
  a, b, multiply = jnp.ones((1024, 1536), dtype), jnp.ones((6144, 1536), dtype), jax.jit(product)
  seconds = list[float]()
  for _ in range(6):
    start = time.perf_counter()
    multiply(a, b).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * a.size * len(b) / statistics.median(seconds[1:]) / 1e12  # the first compiles


def _checked_config(options: RunOptions) -> ModelConfig:
  """The config of model.source, with the biases that the run adds. Raises InputError."""
  config = open_config(options.model.source)
  if options.prune.method == slicegpt.METHOD:
    raise InputError(f'prune.method = {slicegpt.METHOD!r}: mode estimate needs a method that removes groups')
  written = dataclasses.replace(options.export, gguf_types=('auto',))  # by another machine, with llama.cpp
  for of_size in of_each(dataclasses.replace(options, export=written)):
    check_run(of_size, config)
  return with_output_bias(config, options.prune.compensate == 'bias')


def _devices() -> int:
  return device_count() if sharding.mesh() else jax.device_count()


def _memory_table(planned: dict[str, Program], target: Target) -> list[str]:
  columns = ('arguments', 'temporary', 'results', 'other', 'total')
  rows = []
  for title, program in planned.items():
    rows.append([title, *(f'{getattr(program, column) / 1e9:.2f}' for column in columns)])
  peak = max(program.total for program in planned.values()) / 1e9
  fits = 'fits' if peak < _SHARE * target.memory_gb else 'DOES NOT FIT'
  table = Table(['GB per device', *columns], rows)
  return ['', table.markdown(), '', f'peak {peak:.1f} GB of {target.memory_gb:g} GB per device: {fits}']


class Limit(NamedTuple):
  """Seconds that one device needs at its published peaks.

  products, memory, network: for each alone. limit: for all; no execution takes less.
  """

  products: float
  memory: float
  network: float
  limit: float


def limit(program: Program, target: Target) -> Limit:
  """The roofline of a program, kernel by kernel (Williams et al., 10.1145/1498765.1498785).

  Kernels run one after another, and each takes at least as long as its products or its memory; only
  collectives and asynchronous copies run beside them.
  """
  peak, exact, memory = target.peak_tflops * 1e12, target.exact_tflops * 1e12, target.memory_gb_per_s * 1e9
  alone = program.flops / peak, program.moved / memory, program.sent / (target.link_gb_per_s * 1e9)
  kernels = sum(k.times * max(k.flops / peak + k.exact / exact, k.bytes / memory) for k in program.kernels)
  return Limit(*alone, max(*alone, kernels))


def _limit_table(planned: dict[str, Program], target: Target) -> list[str]:
  rows = []
  for title, program in planned.items():
    if program.flops:
      amounts = program.flops / 1e12, program.moved / 1e9, program.sent / 1e9, *limit(program, target)
      rows.append([title, *(f'{x:.3g}' for x in amounts)])
  head = ['TFLOP', 'GB read and written', 'GB sent', 'products', 'memory', 'network', 'limit']
  return [
    '',
    f'Seconds at the published peaks of {target.peak_tflops:g} TFLOP/s, {target.memory_gb_per_s:g} GB/s of '
    f'memory and {target.link_gb_per_s:g} GB/s sent:',
    '',
    Table(['a device, one execution', *head], rows).markdown(),
  ]


def _stage_rows(
  footprint: Footprint, stages: list[ModelConfig], target: Target, size: str
) -> list[list[str]]:
  """A row for each stage of a run; `size` begins each, if there are several."""
  rate, dense = target.peak_tflops * 1e12 * _devices(), footprint.config
  t, schedule, rows = footprint.options.train, footprint.schedule, []
  for k, (config, again) in enumerate(zip(stages, footprint.remat(stages), strict=True), 1):
    tokens = (schedule.end(k) - schedule.start(k)) * t.batch * t.length
    work, params = footprint.step_work(config, again), count_params(config)
    share, seconds = f'{params / count_params(dense):.1%}', duration(tokens * work / rate)
    rows.append([f'{size}{k}', f'{params:,}', share, str(again), f'{work / 1e9:.1f}', f'{tokens:,}', seconds])
  return rows


def _stage_table(footprint: Footprint, rows: list[list[str]], target: Target) -> list[str]:
  rate, options = target.peak_tflops * 1e12 * _devices(), footprint.options
  calibration, scoring = options.prune.calibration, flops.scoring(options, footprint.config)
  passed = scoring * calibration.samples * calibration.length
  head = ['stage', 'parameters', 'of dense', 'remat', 'GFLOP per token', 'tokens', 'time at peak']
  said = f'a scoring pass: {scoring / 1e9:.1f} GFLOP per token, {passed / rate:.2f} s at '
  return ['', f'{said}{target.peak_tflops:g} TFLOP/s per device', '', Table(head, rows).markdown()]


def _total(planned: dict[str, Program], target: Target, price: float, traffic: bool) -> str:
  """The last line: time and cost of the whole run; without `traffic` by its products alone."""
  limits = [(x.times, limit(x, target)) for x in planned.values()]
  seconds = sum(times * (at.limit if traffic else at.products) for times, at in limits)
  hours = _devices() * seconds / 3600
  text = f'\nthe whole run at these peaks: at least {hours:.3g} device-hours, {duration(seconds)}'
  return text + f', costs {hours * price:,.2f}' * bool(price) + ', for products alone' * (not traffic)


MODE = Mode(
  'estimate',
  'estimate memory, traffic, time and cost of a run from shapes alone',
  lambda options, prompts: run(options),
  reads=('model', 'prune', 'train', 'estimate', 'mesh', 'export.dtype', *REQUEST),
  devices=lambda options: prepare(options.estimate),
)
