"""`report.json`: its contents in each mode, and functions to read and write it.

Tables, pages, model cards and grids are made from these reports.
"""

import functools
import importlib.metadata
import json
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any, Literal, Required, TypedDict, get_args

from adapt_jax.machine.processes import is_first
from adapt_jax.models.files import read_json, write_text

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers', 'numpy')

# The model that was measured: the dense one, one just pruned, or one recovered from it.
Of = Literal['dense', 'pruned', 'recovered']
Tasks = dict[str, dict[str, dict[str, Any]]]  # {'dense': {task: {metric: value}}, 'pruned': …}
# What tables and charts call these models, in a run that prunes and in one of mode recover.
PRUNING_NAMES: dict[Of, str] = {'dense': 'dense', 'pruned': 'pruned', 'recovered': 'recovered'}
RECOVERY_NAMES: dict[Of, str] = {'dense': 'teacher', 'pruned': 'before', 'recovered': 'after'}


class ModelReport(TypedDict, total=False):
  """A model and its widths by layer, before pruning; parameter counts are of stored parameters.

  license: the fields of a model card that name it.
  hub: whether `source` is an id of the hub.
  """

  source: Required[str]
  hub: bool
  license: dict[str, str]
  params_before: int
  params_after: int
  params_target: int
  num_heads: list[int]
  num_kv_heads: list[int]
  ffn: list[int]


class PerplexityReport(TypedDict, total=False):
  """Perplexities of the dense model and the last stage on the first text; `definition` describes them."""

  dense: float | None
  pruned: float | None
  recovered: float | None
  definition: str | None


class TextReport(TypedDict, total=False):
  """Measurements on one text: perplexities, and kl, the mean KL(dense ‖ final model) in nats per token.

  bits_per_byte: of mode evaluate; compares models with different vocabularies. definition: describes how
    perplexity is measured.
  """

  dense: float
  bits_per_byte: float
  pruned: float
  recovered: float
  kl: float
  definition: str


class ExampleReport(TypedDict):
  """How the dense model and the result continue the beginning of a text, or answer a question, greedily."""

  text: str
  prompt: str
  dense: str
  result: str


class RatesReport(TypedDict, total=False):
  """repetition: share of a model's answers whose end repeats itself. usable: how many are usable."""

  repetition: Required[float]
  usable: int


class HealthReport(TypedDict, total=False):
  """Whether models still answer (docs/evaluation.md); without a chat template no answer counts as usable.

  answers: how many each model gives. dense: of the only model in mode evaluate. examples: a few of them.
  """

  answers: Required[int]
  dense: Required[RatesReport]
  result: RatesReport
  examples: list[ExampleReport]


class BudgetReport(TypedDict, total=False):
  """What prune.target limits, by the costs of layers: of the dense model, as asked, and of the last stage.

  target: as it was asked. kind: what it limits. unit: of the numbers. measured: of the finished model, in the
  unit: the bytes of its file; or its time on this machine, as medians of the dense and the finished model,
  which run in turn, the median of their ratios and, of a decoding step, the tokens per second.
  """

  target: str
  kind: Required[str]
  unit: Required[str]
  dense: Required[float]
  asked: float
  reached: float
  measured: dict[str, float]


class CostReport(TypedDict, total=False):
  """What a model costs: bytes of its weights and of the KV cache for a token, in the dtype of the export, and
  tokens per second of one prompt (prefill) and of its continuation (decode), if they were measured.
  """

  weights: Required[int]
  kv_cache: Required[int]
  prefill: float
  decode: float


class GainReport(TypedDict, total=False):
  """The costs of the dense model (or the teacher) and of the result. dtype: of most exported weights.

  measured: in words, on what and how the speeds were measured.
  """

  dense: Required[CostReport]
  result: Required[CostReport]
  dtype: Required[str]
  measured: str


class StageReport(TypedDict, total=False):
  """A stage so far; the widths at its end are by layer of the dense model, 0 for a removed layer.

  target, cost: in the unit of the budget; cost is missing where params are the budget.

  perplexity_pruned, perplexity_recovered: on the first text; texts: on all, {'web': {'pruned': …}, …}.
  hidden_size: of the residual stream, if it was sliced.
  """

  stage: Required[int]
  target: float
  cost: float
  hidden_size: int
  params: Required[int]
  perplexity_pruned: float | None
  perplexity_recovered: float | None
  texts: dict[str, TextReport]
  num_heads: list[int]
  num_kv_heads: list[int]
  ffn: list[int]
  tokens: int
  seconds: float


class ScheduleReport(TypedDict):
  """targets: at the end of each stage, in the unit of the budget. train_steps: of the whole run."""

  targets: list[float]
  train_steps: int
  tokens_per_step: int


class MadeReport(TypedDict, total=False):
  """How a report was made: the command, the compiled programs, the time, and versions of libraries."""

  command: str
  compiles: dict[str, int]
  seconds: float
  versions: dict[str, str]


class EvaluationReport(MadeReport, total=False):
  """Report of mode evaluate; tasks: {task: {metric: value}}."""

  model: Required[ModelReport]
  perplexity: PerplexityReport
  texts: dict[str, TextReport]
  tasks: dict[str, dict[str, Any]]
  health: HealthReport


class RunReport(MadeReport, total=False):
  """Report of modes accel, prune, recover and export; also stored with every export as its lineage.

  origin: fields of `reports.origin.Origin`. prune, train: the settings that the result depends on; None if
  nothing was pruned or trained. teacher: if nothing was pruned, what the model is compared with. data:
  sources by use, and as `hub` the names of those that are data sets of the hub. exports: facts about each
  format, {'hf': {'bytes': …}}.
  """

  model: Required[ModelReport]
  origin: dict[str, Any]
  perplexity: PerplexityReport
  texts: dict[str, TextReport]
  tasks: Tasks
  budget: BudgetReport
  gain: GainReport
  schedule: ScheduleReport
  stages: list[StageReport]
  prune: dict[str, Any] | None
  teacher: ModelReport
  train: dict[str, Any] | None
  data: dict[str, tuple[str, ...]]
  exports: dict[str, dict[str, Any]]
  health: HealthReport


class BaseReport(TypedDict):
  """A base model of mode sensitivity, with all layers at one sparsity, and the cost of pruning each further.

  kv_groups, ffn: its widths by layer; …_pruned: a layer's widths if only it is pruned. layers: perplexity
  by layer, as far as measured.
  """

  sparsity: float
  params: int
  perplexity: float
  layer_importance: list[float]
  kv_groups: list[int]
  ffn: list[int]
  kv_groups_pruned: list[int]
  ffn_pruned: list[int]
  layers: list[float]


class SensitivityReport(MadeReport):
  """Report of mode sensitivity."""

  model: ModelReport
  sparsity: float
  bases: list[BaseReport]
  importance: str
  layer_distance: str
  perplexity: PerplexityReport


class CellReport(TypedDict, total=False):
  """A cell of a grid. values: of all fields that vary. state: finished, running, failed or waiting.

  The rest is known once it is finished; error: the reason if it failed. version: of adapt-jax. A cell that
  writes models has budget, bytes (of its first export), faster (how many times as fast as the dense model it
  decodes) and usable (the number of usable answers; usable_dense: of the dense model).
  """

  name: Required[str]
  values: Required[dict[str, Any]]
  state: Required[str]
  texts: dict[str, TextReport]
  params: int
  budget: BudgetReport
  bytes: int
  faster: float
  usable: int
  usable_dense: int
  seconds: float
  version: str
  error: str


class ComparisonReport(MadeReport):
  """Report of mode compare, or of a run of several sizes.

  of: cells or sizes, also the name of their directory. definitions: of perplexity. over: the field of
  repetitions.
  """

  of: str
  model: ModelReport
  fields: list[str]
  over: str
  recover: bool
  cells: list[CellReport]
  definitions: list[str]
  scoring_passes: dict[str, int]


def write_report(path: pathlib.Path, report: Mapping[str, Any]) -> None:
  """Writes a report as JSON atomically, in the first process only."""
  if is_first():
    write_text(path, json.dumps(report, indent=2) + '\n')


def read_report(path: pathlib.Path) -> RunReport:
  """Reads the report of a finished run. Raises InputError if it is damaged."""
  return read_json(path, 'delete it to run again')  # type: ignore[return-value]


def known_perplexities(report: RunReport) -> dict[Of, float]:
  """Perplexities of a run measured so far, in the order dense, pruned, recovered."""
  perplexity: Any = report.get('perplexity') or {}
  return {of: perplexity[of] for of in get_args(Of) if perplexity.get(of) is not None}


def names_of(report: RunReport) -> dict[Of, str]:
  """What tables and charts call the models of this run."""
  return RECOVERY_NAMES if report.get('prune', {}) is None else PRUNING_NAMES


def layer_importance(distance: str, stored: list[float]) -> list[float]:
  """The importances of layers by that distance, larger = more important; cosine is stored as -cos."""
  return [1 + x if distance == 'cosine' else x for x in stored]


def importance_name(distance: str) -> str:
  """What `layer_importance` is, in words."""
  return '1 - cos(input, output)' if distance == 'cosine' else f'{distance} distance between input and output'


def versions(*more: str) -> dict[str, str]:
  """Versions of Python, of this program and of packages that affect a run's results, and of `more`."""
  found = {name: importlib.metadata.version(name) for name in (*_PACKAGES, *more)}
  return {'adapt-jax': _own_version(), 'python': platform.python_version()} | found


@functools.cache
def _own_version() -> str:
  """The version and, in a checkout, its commit, as in '0.2.0 (4baa8ce-dirty)' where files have changed."""
  root = pathlib.Path(__file__).resolve().parents[2]
  try:
    version = importlib.metadata.version('adapt-jax')
  except importlib.metadata.PackageNotFoundError:  # main.py of a checkout
    version = 'not installed'
  if not (root / '.git').exists() or not shutil.which('git'):
    return version
  command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--exclude=*']
  commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
  return f'{version} ({commit})' if commit else version


def made(report: MadeReport) -> list[str]:
  """Lines of text on how a report was made."""
  compiles = ', '.join(f'{name} {count}' for name, count in report['compiles'].items() if count)
  return [
    f'Compiled programs: {compiles or "none"}; {report["seconds"]:.0f} s.',
    f'Command: `{report["command"]}`',
    ', '.join(f'{name} {version}' for name, version in report['versions'].items()),
  ]


def heads_of(report: RunReport) -> tuple[str, str]:
  """The field of a stage, and its title, with the heads that pruning reduces (`prune.attention`)."""
  attention = (report.get('prune') or {}).get('attention') or (report.get('origin') or {}).get('attention')
  by_head = attention == 'query_heads'
  return ('num_heads', 'query heads') if by_head else ('num_kv_heads', 'KV heads')
