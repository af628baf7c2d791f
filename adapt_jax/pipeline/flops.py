"""Floating-point operations of the programs of a run, per token."""

import math

from adapt_jax.config.options import RunOptions
from adapt_jax.config.prune_options import PROGRESSIVE
from adapt_jax.models.config import ModelConfig
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pruning import budget as budgets
from adapt_jax.pruning import programs
from adapt_jax.pruning.budget import Budget
from adapt_jax.pruning.methods import METHODS


def forward(config: ModelConfig, length: int) -> float:
  """FLOPs of a forward pass per token of rows of `length` tokens: see `pruning.budget.flops`."""
  return float(budgets.flops(config, length).dense)


def scoring(options: RunOptions, dense: ModelConfig) -> float:
  """FLOPs per calibration token of one pass: one forward; with gradients two, and the backward.

  The gradient of weights costs as much as a forward pass, that of activations too; curvature needs only the
  latter, plus second moments and solves, which are not counted here.
  """
  kind = programs.importance(options.prune)
  passes = 3 if kind.curvature else 4 if kind.gradient else 1
  return passes * forward(dense, options.prune.calibration.length)


def compensation(options: RunOptions, dense: ModelConfig) -> float:
  """FLOPs per calibration token of least squares or biases, without moments and solves.

  They pass the model forward before the pruning, after it, and corrected.
  """
  return 3 * forward(dense, options.prune.calibration.length)


def scoring_passes(options: RunOptions, dense: ModelConfig, budget: Budget) -> int:
  """How many times a run scores the model, or a method that goes layer by layer passes it forward."""
  prune, schedule = options.prune, Schedule.of(options, budget)
  if prune.method in PROGRESSIVE:
    return math.ceil(prune.steps * (1 - schedule.targets[-1] / budget.dense))
  return schedule.stages * (dense.num_layers if METHODS[prune.method].layer_by_layer else 1)


def training(options: RunOptions, dense: ModelConfig, student: ModelConfig, remat: bool) -> float:
  """FLOPs per token of a step: forward and a backward of twice that; the teacher's.

  With `remat` the layers go forward once more, but not the head. With distill.cache, the teacher does not
  run in the step.
  """
  t, once = options.train, budgets.flops(student, options.train.length)
  again = once.dense - once.fixed if remat else 0
  return float(3 * once.dense + again) + (teacher(options, dense) if t.distill.teacher_beside else 0.0)


def teacher(options: RunOptions, dense: ModelConfig) -> float:
  """FLOPs per token of the teacher's forward pass; 0 without a teacher."""
  return forward(dense, options.train.length) if options.train.distill.alpha else 0.0
