"""The report of a run, from its options and its state: at the end, before it, and for an export."""

from adapt_jax.config.options import RunOptions
from adapt_jax.pipeline.dense_model import DenseModel
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pipeline.state import RunState
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.reports.report import PerplexityReport, RunReport, StageReport, settings
from models.config import count_params


def run_report(
  options: RunOptions, model: DenseModel, state: RunState, definition: str | None = None
) -> RunReport:
  """What a state tells: the report without command and versions, with the open stage as far as it is known.

  definition: what perplexity is, in words.
  """
  dense, rows = count_params(model.source.config), [*state.rows]
  schedule = Schedule.of(options, model.source.config)
  if state.row is not None:
    rows.append({**state.row, **state.compacted.widths(model.config)})
  last: StageReport = rows[-1] if rows else {'stage': 0, 'params': dense}
  perplexity: PerplexityReport = {
    'dense': state.dense_perplexity,
    'pruned': last.get('perplexity_pruned'),
    'recovered': last.get('perplexity_recovered'),
    'definition': definition,
  }
  return {
    'model': {
      'source': model.source.name,
      'params_before': dense,
      'params_after': last['params'],
      'params_target': schedule.targets[-1],
      **PrunePlan.dense(model.config).widths(model.config),
    },
    'perplexity': perplexity,
    'tasks': state.tasks,
    'schedule': {
      'targets': list(schedule.targets),
      'train_steps': schedule.train_steps,
      'tokens_per_step': options.train.batch * options.train.length,
    },
    'stages': rows,
    **settings(options),
    'compiles': state.compiles,
    'seconds': state.seconds,
  }
