"""A rough forecast of a run's time before it starts, so that one that takes hours says so."""

import math
import time

import jax
import jax.numpy as jnp

from adapt_jax.config.options import RunOptions
from adapt_jax.machine.processes import say
from adapt_jax.models.network.backend import on_cpu
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pipeline.schedule import Schedule

_LONG = 3600.0  # seconds from which a run announces itself
_SHARE = 0.6  # of the speed of a lone product, which whole programs reach
_SIZE, _SIZE_ON_ACCELERATORS = 1024, 8192  # of the product that is timed
_REPEATS = 3


def announce(runs: list[tuple[RunOptions, Inputs]]) -> None:
  """Prints about how long these runs will take together, if that is more than an hour."""
  work = sum(operations(options, inputs) for options, inputs in runs)
  if not work:
    return
  seconds = work / (_SHARE * _speed(runs[0][1]) * jax.device_count())
  if seconds > _LONG:
    say(f'this will take about {duration(seconds)}, by a rough estimate')


def operations(options: RunOptions, inputs: Inputs) -> float:
  """Floating-point operations of a run, without moments, solves and the tasks of the harness."""
  config, whole, prune, train = inputs.config, inputs.source.config, options.prune, options.train
  schedule = Schedule.of(options, inputs.budget)
  rows = prune.calibration.samples * prune.calibration.length
  found = flops.scoring_passes(options, config, inputs.budget) * rows * flops.scoring(options, config)
  if prune.compensate == 'least_squares':
    found += schedule.stages * rows * flops.compensation(options, config)
  if prune.hidden:
    found += rows * flops.layers(whole, prune.calibration.length)  # the moments of the stream
    found += rows * flops.narrowing(options, whole, config)
  windows = sum(blocks.tokens.size for blocks in inputs.evaluate.values())
  measured = 3 + schedule.stages * (2 if inputs.train else 1)  # with both models of the divergence
  found += measured * windows * flops.forward(whole, options.evaluate.length)
  if inputs.train:
    # The student is taken to shrink as its cost does, which says too little if only the KV cache counts.
    for stage, cost in enumerate(schedule.targets, 1):
      tokens = (schedule.end(stage) - schedule.start(stage)) * train.batch * train.length
      student = flops.forward(config, train.length) * cost / inputs.budget.start
      found += tokens * flops.training(options, whole, student)
      if train.distill.kept_ids:  # at most: rows that come again are in the cache
        found += tokens * flops.teacher(options, whole)
  return found


def _speed(inputs: Inputs) -> float:
  """Operations per second of a product on one device, the best of a few."""
  size = _SIZE if on_cpu() else _SIZE_ON_ACCELERATORS
  a = jnp.ones((size, size), inputs.dtype)
  product = jax.jit(lambda a: a @ a)
  jax.block_until_ready(product(a))
  best = math.inf
  for _ in range(_REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(product(a))
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def duration(seconds: float) -> str:
  """The duration as text: 40 s, 12 min, 3.5 h; short ones to two digits, such as 0.035 s."""
  if seconds < 9.5:  # from there on two digits are whole seconds
    return f'{seconds:.2g} s'
  if seconds < 90:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
