"""The one state of a run, saved together and resumed to the same bits.

On disk it is the newest checkpoint (arrays, position, plan, history) and `plan.json`, written after every
pruning step: the steps taken since that checkpoint. Everything else is a function of the config.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from adapt_jax.machine.processes import decide, is_first, say
from adapt_jax.pipeline.checkpoint import Checkpoints
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.plan import PrunePlan, PruneState
from models.config import ModelConfig
from models.errors import InputError
from models.files import write_text


@dataclasses.dataclass
class RunState:
  """Where a run stands.

  arrays: {'params', 'optimizer'}, at the widths that `compacted` keeps; empty while stage 1 is scored.
  pruning: the schedule; ahead of `compacted` while a stage is being pruned.
  stage: 1-based, 0 before the first one is pruned. train_step: global steps done.
  complete: the stage's training is over.
  dense_perplexity: of the source. tasks: scores 'dense', 'pruned' and 'recovered', as far as they are known.
  rows: finished stages, as in report.json. row: the open stage's.
  seconds, compiles: spent up to the last save.
  """

  arrays: dict[str, Any]
  compacted: PrunePlan
  pruning: PruneState
  stage: int = 0
  train_step: int = 0
  complete: bool = True
  dense_perplexity: float | None = None
  tasks: dict[str, Any] = dataclasses.field(default_factory=dict)
  rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  row: dict[str, Any] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  compiles: dict[str, int] = dataclasses.field(default_factory=dict)


_IN_JSON = (
  'stage', 'train_step', 'complete', 'dense_perplexity', 'tasks', 'rows', 'row', 'seconds', 'compiles',
)  # fmt: skip


class StateStore:
  """Saves and resumes a `RunState` in its workdir.

  Args:
    workdir: of the run.
    config: of the dense model, which plans number.
    metrics: cut, on resume, to what the saved state has seen.
  """

  def __init__(self, workdir: Workdir, config: ModelConfig, metrics: MetricsLog):
    self._plan, self._config, self._metrics = workdir.plan, config, metrics
    self._checkpoints = Checkpoints(workdir.checkpoints)

  def save(self, state: RunState) -> None:
    """A checkpoint; only between prunings, when the arrays have the plan's widths."""
    meta = {name: getattr(state, name) for name in _IN_JSON}
    meta |= {'pruning': state.pruning.to_json(), 'metrics_lines': self._metrics.lines}
    self._checkpoints.save(state.arrays, meta)

  def save_plan(self, state: RunState, stage: int) -> None:
    """`plan.json`: what is kept now, and what resuming in the middle of a stage's pruning needs."""
    plan = {
      'stage': stage,
      'params': state.pruning.plan.params(self._config),
      'dense_perplexity': state.dense_perplexity,
      'tasks': state.tasks,
      'metrics_lines': self._metrics.lines,
    }
    if is_first():
      write_text(self._plan, json.dumps(plan | state.pruning.to_json()) + '\n')

  def resume(self, shapes: Callable[[PrunePlan], Any], start: Callable[[], dict[str, Any]]) -> RunState:
    """The state that was saved last.

    Args:
      shapes: plan -> the arrays' tree of `jax.ShapeDtypeStruct` at its widths.
      start: the arrays of a run without a checkpoint.
    """
    number, lines = decide(self._checkpoints.latest), 0
    if number is None:
      dense = PruneState.start(self._config)
      state = RunState(start(), dense.plan, dense)
    else:
      meta = self._checkpoints.meta(number)
      pruning, lines = PruneState.from_json(meta['pruning'], self._config), meta['metrics_lines']
      arrays = self._checkpoints.restore(number, shapes(pruning.plan))
      state = RunState(arrays, pruning.plan, pruning, **{name: meta[name] for name in _IN_JSON})
      say(f'resuming at stage {state.stage}, training step {state.train_step}')
    if state.complete and decide(self._plan.exists):
      lines = self._resume_pruning(state, lines)
    self._metrics.cut(lines)
    return state

  def _resume_pruning(self, state: RunState, lines: int) -> int:
    """Takes up the steps that plan.json tells, if they are of the next stage; returns the log's length."""
    try:
      saved = decide(lambda: json.loads(self._plan.read_text()))
      if saved['stage'] != state.stage + 1:
        return lines
      pruning, lines = PruneState.from_json(saved, self._config), int(saved['metrics_lines'])
      state.pruning, state.dense_perplexity = pruning, saved['dense_perplexity']
      state.tasks = saved['tasks']
    except InputError:
      raise
    except (ValueError, KeyError, TypeError) as error:
      raise InputError(
        f'{self._plan} is damaged ({type(error).__name__}): delete it to take this stage up from its start'
      ) from None
    say(f'resuming in the pruning of stage {saved["stage"]}, after step {saved["step"]}')
    return lines

  def close(self) -> None:
    self._checkpoints.close()
