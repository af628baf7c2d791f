"""Builds the report of a run from its options and its state: during the run, at its end, and for exports."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

from adapt_jax.config import identity
from adapt_jax.config.options import RunOptions
from adapt_jax.data.documents import hub_datasets
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import Source
from adapt_jax.pipeline.dense_model import DenseModel
from adapt_jax.pipeline.schedule import Schedule, target_cost
from adapt_jax.pipeline.state import RunState
from adapt_jax.pruning.budget import Budget
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.reports.report import (
  BudgetReport,
  ModelReport,
  PerplexityReport,
  RunReport,
  StageReport,
  TextReport,
)

_T = TypeVar('_T')


def run_report(
  options: RunOptions,
  model: DenseModel,
  budget: Budget,
  state: RunState,
  definitions: Mapping[str, str] = MappingProxyType({}),
) -> RunReport:
  """The report of a state, without command and versions; the open stage is included as far as it is known.

  definitions: the definition of perplexity on each text, in words.
  """
  schedule, rows = Schedule.of(options, budget), [*state.rows]
  if state.row is not None:
    rows.append({**state.row, **state.compacted.widths(model.config)})
  unpruned: StageReport = {
    'stage': 0,
    'params': count_params(model.source.config),
    'cost': budget.number(budget.dense),
  }
  last = rows[-1] if rows else unpruned
  perplexity: PerplexityReport = {
    'dense': first(state.dense),
    'pruned': last.get('perplexity_pruned'),
    'recovered': last.get('perplexity_recovered'),
    'definition': first(definitions),
  }
  described_settings, origin = _settings(options), model.origin
  if described_settings['prune'] and options.prune.method in METHODS:  # SliceGPT removes none
    described_settings['prune']['attention'] = budget.removes.name  # not auto
    origin = dataclasses.replace(origin, attention=budget.removes.name)
  return {
    'origin': dataclasses.asdict(origin),
    'model': _model(options, model, budget, last),
    'perplexity': perplexity,
    'texts': _texts(state, last, definitions),
    'tasks': state.tasks,
    'budget': _budget(options, budget, last),
    'schedule': {
      'targets': [budget.number(target) for target in schedule.targets],
      'train_steps': schedule.train_steps,
      'tokens_per_step': options.train.batch * options.train.length,
    },
    'stages': rows,
    **described_settings,
    'compiles': state.compiles,
    'seconds': state.seconds,
  }


def described_source(source: Source) -> ModelReport:
  """A model before pruning, or a teacher."""
  size = count_params(source.config)
  return {'source': source.name, 'hub': source.hub, 'license': source.license, 'params_before': size}


def _model(options: RunOptions, model: DenseModel, budget: Budget, last: StageReport) -> ModelReport:
  """The dense model, and the size of the last stage's."""
  described: ModelReport = {
    **described_source(model.source),
    'params_after': last['params'],
    **PrunePlan.dense(model.config).widths(model.config),
  }
  if budget.kind == 'params':
    described['params_target'] = target_cost(budget, options.prune.limit)
  return described


def _budget(options: RunOptions, budget: Budget, last: StageReport) -> BudgetReport:
  """What was asked of the budget, and what the last stage reached."""
  return {
    'target': options.prune.limit.text,
    'kind': budget.kind,
    'unit': budget.unit.name,
    'dense': budget.number(budget.dense),
    'asked': budget.number(target_cost(budget, options.prune.limit)),
    'reached': last.get('cost', last['params']),
  }


def first(of_texts: Mapping[str, _T]) -> _T | None:
  """The value of the first text; None if there are no texts."""
  return next(iter(of_texts.values()), None)


def with_recovered(row: StageReport, recovered: Mapping[str, float]) -> dict[str, TextReport]:
  """The texts of a stage with their perplexities after its training."""
  texts = row.get('texts', {})
  return {name: {**texts.get(name, {}), 'recovered': value} for name, value in recovered.items()} or texts


def _texts(state: RunState, last: StageReport, definitions: Mapping[str, str]) -> dict[str, TextReport]:
  """All known values of each text, for the dense model and the last stage."""
  found: dict[str, TextReport] = {}
  for name, dense in state.dense.items():
    found[name] = {'dense': dense, **last.get('texts', {}).get(name, {})}
    if name in definitions:
      found[name]['definition'] = definitions[name]
  return found


def _settings(options: RunOptions) -> RunReport:
  """The parts `prune`, `train` and `data` of a run's report: how it prunes and trains, and on which data."""
  texts = [entry for entries in options.evaluate.texts.values() for entry in entries]
  trains, found = options.train.tokens > 0, identity.settings(options, ('prune', 'train'))
  return {  # type: ignore[typeddict-item]
    'prune': found['prune'] if options.prune.prunes else None,
    'train': found['train'] if trains else None,
    'data': {
      'calibration': options.prune.calibration.source,
      'train': options.train.source if trains else (),
      'evaluate': options.evaluate.source,
      'hub': hub_datasets([*options.prune.calibration.source, *options.train.source, *texts]),
    },
  }
