"""Stages of Adapt-Accel: the cost of the model and the training steps at the end of each (section 4)."""

import dataclasses

from adapt_jax.config.options import RunOptions, TrainOptions
from adapt_jax.config.targets import Target, parse
from adapt_jax.models.errors import InputError
from adapt_jax.pruning.budget import Budget
from adapt_jax.pruning.methods.base import Method

_LESS = 'a smaller one', 'a larger one'  # of tokens a second, more is a smaller model


def target_cost(budget: Budget, target: Target | float | str) -> int:
  """The highest cost that `prune.target` allows, in the parts of the budget's unit. Raises InputError."""
  cost = budget.target(target)
  if cost > budget.dense:
    raise InputError(
      f'prune.target = {parse(target).text} allows {budget.text(cost)}, but the model has only '
      f'{budget.text(budget.dense)}: ask for {_LESS[parse(target).kind == "decode"]}'
    )
  return cost


def reachable_target(method: Method, target: Target | float | str) -> int:
  """`target_cost`, if the method can reach it. Raises InputError."""
  budget, smallest = method.budget, method.smallest()
  if (cost := target_cost(budget, target)) < smallest:
    raise InputError(
      f'prune.target = {parse(target).text} asks for {budget.text(cost)}, but {type(method).__name__} always '
      f'keeps {budget.text(smallest)}: ask for {_LESS[parse(target).kind != "decode"]} '
      f'(a number up to 1 is a fraction)'
    )
  return cost


def stage_targets(budget: Budget, target: Target | float | str, stages: int, rule: str) -> list[int]:
  """Cost at the end of each stage: linear P0 − (P0 − P*)·k/N, geometric P0·(P*/P0)^(k/N).

  P0 is the cost of the dense model, and P* the target.
  """
  start, last = budget.dense, target_cost(budget, target)
  shares = [k / stages for k in range(1, stages)]
  if rule == 'linear':
    return [int(start - (start - last) * x) for x in shares] + [last]
  return [int(start * (last / start) ** x) for x in shares] + [last]


def stage_steps(options: TrainOptions, stages: int) -> list[int]:
  """Global step at which each stage ends; the last is the total number of steps.

  Stage i of N has the share 2i/(N(N+1)) of all steps (paper section 4, linear).
  """
  total = options.tokens // (options.batch * options.length)
  return [round(total * (i * (i + 1) / (stages * (stages + 1)))) for i in range(1, stages)] + [total]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A run's stages.

  targets: the highest cost at the end of each, in the parts of the budget's unit. ends: the global training
    step at which each ends.
  """

  targets: tuple[int, ...]
  ends: tuple[int, ...]

  @classmethod
  def of(cls, options: RunOptions, budget: Budget) -> 'Schedule':
    """The schedule of the options, for the run's budget."""
    prune = options.prune
    targets = stage_targets(budget, prune.limit, prune.stages, prune.stage_targets)
    return cls(tuple(targets), tuple(stage_steps(options.train, prune.stages)))

  @property
  def stages(self) -> int:
    return len(self.targets)

  @property
  def train_steps(self) -> int:
    """Training steps of the whole run."""
    return self.ends[-1]

  def target(self, stage: int) -> int:
    """The highest cost at the end of a stage, 1-based."""
    return self.targets[stage - 1]

  def start(self, stage: int) -> int:
    """The global training step at which a stage begins."""
    return self.ends[stage - 2] if stage > 1 else 0

  def end(self, stage: int) -> int:
    """The global training step at which a stage ends."""
    return self.ends[stage - 1]
