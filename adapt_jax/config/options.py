"""The run's options as frozen dataclasses, checked field by field.

`configs/base.py` has the defaults and says what each field means; `main.py` turns its ConfigDict
into a `RunOptions` by `from_dict`. Nothing below sees a ConfigDict.
"""

import dataclasses
import math
import types
import typing
from typing import Any

from adapt_jax.config.values import grid, integers, numbers, strings
from adapt_jax.pruning.compensate import COMPENSATIONS
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.scorer import DISTANCES, IMPORTANCES
from adapt_jax.pruning.serving_widths import multiples
from adapt_jax.pruning.widths import MAX_SPARSITY
from models.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  source: str
  dtype: str


@dataclasses.dataclass(frozen=True)
class MeshOptions:
  data: int
  fsdp: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class DataOptions:
  text_field: str
  messages_field: str
  chat_template: str
  cache: str


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
  align_kv: int
  align_ffn: int
  serve: str
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
  weights: tuple[float, ...]
  layout: str
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
  mu_dtype: str
  remat: bool
  save_every: int
  distill: DistillOptions


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  source: tuple[str, ...]
  length: int
  batch: int
  max_tokens: int
  tasks: tuple[str, ...]
  suite: str
  tasks_path: str
  fewshot: int
  limit: int

  @property
  def has_tasks(self) -> bool:
    """Whether lm-evaluation-harness has work."""
    return bool(self.tasks or self.suite)


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
class PlanOptions:
  devices: int
  device_memory_gb: float
  peak_tflops: float
  depths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float
  batch: int
  chat: bool
  dense: str


@dataclasses.dataclass(frozen=True)
class BenchOptions:
  dense: str
  prompt_length: int
  new_tokens: int
  batch: int
  repeats: int


@dataclasses.dataclass(frozen=True)
class ExportOptions:
  formats: tuple[str, ...]
  dtype: str
  gguf_types: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """Everything that a run depends on; equal options and equal files give equal bits."""

  model: ModelOptions
  mesh: MeshOptions
  data: DataOptions
  prune: PruneOptions
  train: TrainOptions
  evaluate: EvaluateOptions
  sensitivity: SensitivityOptions
  compare: CompareOptions
  plan: PlanOptions
  generate: GenerateOptions
  bench: BenchOptions
  export: ExportOptions
  seed: int

  def identity(self) -> dict[str, Any]:
    """What makes two runs the same: not what changes memory and speed alone, for other devices to go on.

    Nor the forms of the result: a run that cannot write one may go on with others.
    """
    values = dataclasses.asdict(self)
    del values['export']['formats'], values['export']['gguf_types']
    del (
      values['mesh'],
      values['plan'],
      values['generate'],
      values['bench'],
      values['data']['cache'],
      values['evaluate']['batch'],
    )
    del values['prune']['calibration']['batch'], values['train']['micro_batch']
    del values['train']['remat'], values['train']['save_every']
    return values


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
    convert = {float: numbers, int: integers, str: strings}.get(typing.get_args(kind)[0], grid)
    return convert(value, where)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise InputError(f'{where} = {value!r} must be of type {kind.__name__}')
  return value


_CHOICES = {
  'model.dtype': ('auto', 'float32', 'bfloat16'),
  'export.dtype': ('auto', 'float32', 'bfloat16', 'float16'),
  'prune.method': tuple(METHODS),
  'prune.stage_targets': ('linear', 'geometric'),
  'prune.importance': tuple(IMPORTANCES),
  'prune.compat': ('', 'reference'),
  'prune.compensate': COMPENSATIONS,
  'prune.layer_distance': tuple(DISTANCES),
  'evaluate.suite': ('', 'paper'),
  'train.layout': ('packed', 'padded'),
  'train.schedule': ('wsd', 'cosine'),
  'train.split': ('linear', 'constant', 'cosine'),
  'train.optimizer_state': ('carry', 'reset'),
  'train.mu_dtype': ('float32', 'bfloat16'),
}
# Field -> (lowest, highest) allowed, both included.
_RANGES: dict[str, tuple[float, float]] = {
  'prune.stages': (1, 10_000),
  'prune.steps': (1, 1_000_000),
  'prune.ratio': (1e-6, 1),
  'prune.amplitude': (0, 1),
  'prune.align_kv': (1, 65_536),
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
  'evaluate.fewshot': (-1, 1000),
  'evaluate.limit': (0, 10**9),
  'sensitivity.sparsity': (1e-6, MAX_SPARSITY),
  'generate.max_new_tokens': (1, 10**7),
  'generate.temperature': (0, 1e3),
  'generate.top_k': (0, 10**9),
  'generate.top_p': (1e-6, 1),
  'generate.batch': (1, 10**9),
  'bench.prompt_length': (1, 10**7),
  'bench.new_tokens': (2, 10**7),
  'bench.batch': (1, 10**9),
  'bench.repeats': (1, 10**6),
  'plan.devices': (0, 65_536),
  'plan.device_memory_gb': (1e-3, 1e6),
  'plan.peak_tflops': (1e-6, 1e9),
  'seed': (0, 2**31 - 1),
}
EXPORTS = ('hf', 'hf_padded', 'gguf')  # forms of the result
GGUF_TYPES = ('auto', 'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0')
BLOCKS = ('both', 'attention', 'mlp')  # what mode sensitivity prunes of a layer


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
  multiples(options.prune.serve)
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
  _check_weights(options.train)
  _check_mesh(options.mesh)
  depths = options.plan.depths
  if depths and (len(depths) != 2 or not 0 < depths[0] < depths[1]):
    raise InputError(f'config.plan.depths = {depths}: give two growing numbers of layers, or none')
  _check_sensitivity(options.sensitivity)
  _check_each('export.formats', options.export.formats, EXPORTS)
  _check_each('export.gguf_types', options.export.gguf_types, GGUF_TYPES)


def _check_mesh(options: MeshOptions) -> None:
  sizes = dataclasses.asdict(options)
  for axis, size in sizes.items():
    if size < 1 and size != -1:
      raise InputError(f'config.mesh.{axis} = {size}: give a number of devices, or -1 for all that are left')
  if len(filling := [axis for axis, size in sizes.items() if size == -1]) > 1:
    raise InputError(
      f'config.mesh.{filling[0]} = -1, and config.mesh.{filling[1]} too: only one can take all that are left'
    )


def _check_weights(train: TrainOptions) -> None:
  weights, count = train.weights, len(train.source)
  if weights and (len(weights) != count or not all(0 <= x < math.inf for x in weights) or not any(weights)):
    raise InputError(
      f'config.train.weights = {weights!r} must be one number from 0 up for each of the {count} entries of '
      'config.train.source, not all 0; or none, for all their documents alike'
    )


def _check_sensitivity(options: SensitivityOptions) -> None:
  bases = options.bases
  if not bases or not all(0 <= x <= MAX_SPARSITY for x in bases) or len(set(bases)) < len(bases):
    raise InputError(
      f'config.sensitivity.bases = {bases!r}: name one or more numbers between 0 and {MAX_SPARSITY}, each '
      f'once'
    )
  _check_each('sensitivity.blocks', options.blocks, BLOCKS)


def _check_each(field: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> None:
  if not values or not set(values) <= set(allowed) or len(set(values)) < len(values):
    raise InputError(f'config.{field} = {values!r}: name one or more of {", ".join(allowed)}, each once')
