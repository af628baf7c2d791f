"""The run's options as frozen dataclasses, checked field by field.

`configs/base.py` has the defaults and says what each field means; `main.py` turns its ConfigDict
into a `RunOptions` by `from_dict`. Nothing below sees a ConfigDict.
"""

import dataclasses
import math
import types
import typing
from typing import Any

from adapt_jax.allocate import MAX_SPARSITY
from adapt_jax.compensate import COMPENSATIONS
from adapt_jax.importance import DISTANCES, IMPORTANCES
from adapt_jax.methods import METHODS
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  source: str
  dtype: str


@dataclasses.dataclass(frozen=True)
class DataOptions:
  text_field: str
  messages_field: str


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
  source: tuple[str, ...]
  samples: int
  length: int
  batch: int


@dataclasses.dataclass(frozen=True)
class PruneOptions:
  method: str
  target: float
  stages: int
  stage_targets: str
  steps: int
  ratio: float
  amplitude: float
  importance: str
  layer_distance: str
  align_ffn: int
  compat: str
  compensate: str
  calibration: CalibrationOptions


@dataclasses.dataclass(frozen=True)
class DistillOptions:
  alpha: float
  temperature: float


@dataclasses.dataclass(frozen=True)
class TrainOptions:
  source: tuple[str, ...]
  tokens: int
  batch: int
  micro_batch: int
  length: int
  lr: float
  min_lr: float
  schedule: str
  warmup: float
  clip: float
  split: str
  optimizer_state: str
  remat: bool
  save_every: int
  distill: DistillOptions


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  source: tuple[str, ...]
  length: int
  batch: int
  max_tokens: int


@dataclasses.dataclass(frozen=True)
class SensitivityOptions:
  sparsity: float
  bases: tuple[float, ...]
  blocks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CompareOptions:
  grid: tuple[dict[str, Any], ...] = ()
  recover: bool = False
  x: str = 'prune.target'
  over: str = 'seed'


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  dtype: str


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """Everything that a run depends on; equal options and equal files give equal bits."""

  model: ModelOptions
  data: DataOptions
  prune: PruneOptions
  train: TrainOptions
  evaluate: EvaluateOptions
  sensitivity: SensitivityOptions
  compare: CompareOptions
  export: ExportOptions
  seed: int


def from_dict(values: dict[str, Any]) -> RunOptions:
  """Builds and checks the options; raises InputError naming field, value and remedy."""
  options = _build(RunOptions, values, 'config')
  _check(options)
  return options


def _build(cls: Any, values: Any, where: str) -> Any:
  if not isinstance(values, dict):
    raise InputError(f'{where} = {values!r} must be a group of fields')
  kinds = typing.get_type_hints(cls)
  if unknown := sorted(values.keys() - kinds.keys()):
    raise InputError(f'{where}.{unknown[0]} is unknown; fields here: {", ".join(kinds)}')
  if absent := sorted(kinds.keys() - values.keys()):
    raise InputError(f'{where}.{absent[0]} is missing: start from configs/base.py')
  return cls(**{k: _convert(kind, values[k], f'{where}.{k}') for k, kind in kinds.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, where)
  if isinstance(kind, types.GenericAlias):  # one string or number is a tuple of one
    return {float: _numbers, str: _strings}.get(typing.get_args(kind)[0], _grid)(value, where)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise InputError(f'{where} = {value!r} must be of type {kind.__name__}')
  return value


def _strings(value: Any, where: str) -> tuple[str, ...]:
  items = (value,) if isinstance(value, str) else value
  if not isinstance(items, (list, tuple)) or not all(isinstance(x, str) for x in items):
    raise InputError(f'{where} = {value!r} must be a list of strings')
  return tuple(x for x in items if x)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
  items = value if isinstance(value, (list, tuple)) else (value,)
  try:  # the command line gives strings
    return tuple(float(x) for x in items if x != '')
  except (TypeError, ValueError):
    raise InputError(f'{where} = {value!r} must be a list of numbers') from None


def _grid(value: Any, where: str) -> tuple[dict[str, Any], ...]:
  parts = (value,) if isinstance(value, dict) else value
  if not isinstance(parts, (list, tuple)) or not all(isinstance(part, dict) for part in parts):
    raise InputError(f"{where} = {value!r} must be a list of groups such as {{'prune.target': (0.9, 0.8)}}")
  found = []
  for part in parts:
    values = {k: tuple(v) if isinstance(v, (list, tuple)) else (v,) for k, v in part.items()}
    if not part or not all(values.values()) or not all(isinstance(k, str) for k in part):
      raise InputError(f'{where} has {part!r}: name fields, and one value or more for each')
    found.append(values)
  return tuple(found)


_CHOICES = {
  'model.dtype': ('auto', 'float32', 'bfloat16'),
  'export.dtype': ('auto', 'float32', 'bfloat16', 'float16'),
  'prune.method': tuple(METHODS),
  'prune.stage_targets': ('linear', 'geometric'),
  'prune.importance': tuple(IMPORTANCES),
  'prune.compat': ('', 'reference'),
  'prune.compensate': COMPENSATIONS,
  'prune.layer_distance': tuple(DISTANCES),
  'train.schedule': ('wsd', 'cosine'),
  'train.split': ('linear', 'constant', 'cosine'),
  'train.optimizer_state': ('carry', 'reset'),
}
# Field -> (lowest, highest) allowed, both included.
_RANGES: dict[str, tuple[float, float]] = {
  'prune.stages': (1, 10_000),
  'prune.steps': (1, 1_000_000),
  'prune.ratio': (1e-6, 1),
  'prune.amplitude': (0, 1),
  'prune.align_ffn': (1, 65_536),
  'prune.calibration.samples': (1, 10**9),
  'prune.calibration.length': (2, 10**7),
  'prune.calibration.batch': (1, 10**9),
  'train.tokens': (0, 10**15),
  'train.batch': (1, 10**9),
  'train.micro_batch': (1, 10**9),
  'train.length': (2, 10**7),
  'train.lr': (0, 1),
  'train.min_lr': (0, 1),
  'train.warmup': (0, 1),
  'train.clip': (1e-12, 1e12),
  'train.save_every': (1, 10**9),
  'train.distill.alpha': (0, 1),
  'train.distill.temperature': (1e-3, 1e3),
  'evaluate.length': (2, 10**7),
  'evaluate.batch': (1, 10**9),
  'evaluate.max_tokens': (0, 10**15),
  'sensitivity.sparsity': (1e-6, MAX_SPARSITY),
  'seed': (0, 2**31 - 1),
}
BLOCKS = ('both', 'attention', 'mlp')  # what mode sensitivity prunes of a layer
_DIVIDES = (
  ('prune.calibration.batch', 'prune.calibration.samples'),
  ('train.micro_batch', 'train.batch'),
)


def _get(options: RunOptions, field: str) -> Any:
  value: Any = options
  for name in field.split('.'):
    value = getattr(value, name)
  return value


def _check(options: RunOptions) -> None:
  for field, choices in _CHOICES.items():
    if (value := _get(options, field)) not in choices:
      raise InputError(f'config.{field} = {value!r}: choose one of {", ".join(choices)}')
  for field, (low, high) in _RANGES.items():
    if not low <= (value := _get(options, field)) <= high:
      raise InputError(f'config.{field} = {value!r} must lie between {low:g} and {high:g}')
  for part, whole in _DIVIDES:
    if _get(options, whole) % _get(options, part):
      raise InputError(
        f'config.{part} = {_get(options, part)} must divide config.{whole} = {_get(options, whole)}'
      )
  if options.prune.compat and not METHODS[options.prune.method].in_reference:
    raise InputError(
      f'config.prune.compat = {options.prune.compat!r} is of the methods '
      f'{" and ".join(n for n, m in METHODS.items() if m.in_reference)}, not of config.prune.method = '
      f'{options.prune.method!r}: leave compat empty'
    )
  if options.prune.compat and options.prune.compensate != 'none':
    raise InputError(
      f'config.prune.compensate = {options.prune.compensate!r} is not what config.prune.compat = '
      f"{options.prune.compat!r} does: set it to 'none'"
    )
  if not 0 < options.prune.target < math.inf:
    raise InputError(
      f'config.prune.target = {options.prune.target!r} must be positive: a fraction kept (≤ 1) or a '
      f'number of parameters (> 1)'
    )
  if options.train.min_lr > options.train.lr:
    raise InputError(
      f'config.train.min_lr = {options.train.min_lr} is above config.train.lr = {options.train.lr}: lower it'
    )
  _check_sensitivity(options.sensitivity)


def _check_sensitivity(options: SensitivityOptions) -> None:
  for field, allowed in (('bases', f'numbers between 0 and {MAX_SPARSITY}'), ('blocks', ', '.join(BLOCKS))):
    values = getattr(options, field)
    good = all(0 <= x <= MAX_SPARSITY if field == 'bases' else x in BLOCKS for x in values)
    if not values or not good or len(set(values)) < len(values):
      raise InputError(f'config.sensitivity.{field} = {values!r}: name one or more of {allowed}, each once')
