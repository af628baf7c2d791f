"""Stages of Adapt-Accel: the parameters at the end of each and the training steps in it (paper section 4)."""

import dataclasses
import math

from adapt_jax.config.options import RunOptions, TrainOptions
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError


def target_params(config: ModelConfig, target: float) -> int:
  """`prune.target` as a number of stored parameters: a fraction kept (≤ 1) or the number itself."""
  total = count_params(config)
  params = int(total * target) if target <= 1 else int(target)
  if params > total:
    raise InputError(
      f'config.prune.target = {target:,.0f} is above the {total:,} parameters of the model: lower it'
    )
  return params


def stage_targets(
  config: ModelConfig, target: float, stages: int, rule: str, original: ModelConfig | None = None
) -> list[int]:
  """Parameters at the end of each stage: linear P0 − (P0 − P*)·k/N, geometric P0·(P*/P0)^(k/N).

  original: of the model that the target is a fraction of, if that is not `config`, because its vocabulary was
  trimmed. If that alone reaches the target, there is nothing left to prune.
  """
  dense = count_params(config)
  last = min(dense, target_params(original or config, target))
  shares = [k / stages for k in range(1, stages)]
  if rule == 'linear':
    return [int(dense - (dense - last) * x) for x in shares] + [last]
  return [int(dense * (last / dense) ** x) for x in shares] + [last]


def stage_steps(options: TrainOptions, stages: int) -> list[int]:
  """Global step at which each stage ends; the last is the total number of steps.

  Shares of paper section 4 for stage i of N: linear 2i/(N(N+1)), constant 1/N, cosine
  cos((i−1)π/2N) − cos(iπ/2N).
  """
  total = options.tokens // (options.batch * options.length)
  done = {
    'linear': lambda i: i * (i + 1) / (stages * (stages + 1)),
    'constant': lambda i: i / stages,
    'cosine': lambda i: 1 - math.cos(i * math.pi / (2 * stages)),
  }[options.split]
  return [round(total * done(i)) for i in range(1, stages)] + [total]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A run's stages.

  targets: parameters at the end of each. ends: the global training step at which each ends.
  """

  targets: tuple[int, ...]
  ends: tuple[int, ...]

  @classmethod
  def of(cls, options: RunOptions, config: ModelConfig, original: ModelConfig | None = None) -> 'Schedule':
    """The schedule of the options; `config` is the dense model's. original: as for `stage_targets`."""
    prune = options.prune
    targets = stage_targets(config, prune.target, prune.stages, prune.stage_targets, original)
    return cls(tuple(targets), tuple(stage_steps(options.train, prune.stages)))

  @property
  def stages(self) -> int:
    return len(self.targets)

  @property
  def train_steps(self) -> int:
    """Training steps of the whole run."""
    return self.ends[-1]

  def target(self, stage: int) -> int:
    """Parameters at the end of a stage, 1-based."""
    return self.targets[stage - 1]

  def start(self, stage: int) -> int:
    """The global training step at which a stage begins."""
    return self.ends[stage - 2] if stage > 1 else 0

  def end(self, stage: int) -> int:
    """The global training step at which a stage ends."""
    return self.ends[stage - 1]
