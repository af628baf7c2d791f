"""The state of a run, saved together and resumed to the same bits.

On disk it is the newest checkpoint (arrays, position, plan, history) and `plan.json`, which is written after
every pruning step and holds the steps since that checkpoint. Everything else is a function of the config.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adapt_jax.machine.processes import decide, is_first, say
from adapt_jax.machine.progress import phase
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import reading
from adapt_jax.models.files import json_checksum, read_json, write_text
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import mesh, placed
from adapt_jax.pipeline.checkpoint import Checkpoints
from adapt_jax.pipeline.dense_model import DenseModel
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import surgery
from adapt_jax.pruning.attention_units import KV_GROUPS, AttentionUnit
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.reports.report import Of, StageReport, Tasks
from adapt_jax.training.step import TrainState


@dataclasses.dataclass
class RunState:
  """The state of a run. What changes several fields together is a method, one for each event of a run.

  arrays: {'params', 'optimizer'}, at the widths that `compacted` keeps; empty while stage 1 is scored.
  pruning: the schedule; ahead of `compacted` while a stage is being pruned.
  stage: 1-based, 0 before the first one is pruned. train_step: global steps done.
  complete: the stage's training is finished.
  dense: perplexity of the source by text. tasks: scores 'dense', 'pruned' and 'recovered', as far as known.
  rows: finished stages, as in report.json. row: the row of the open stage.
  seconds, compiles: spent up to the last save.
  """

  arrays: TrainState
  compacted: PrunePlan
  pruning: PruneState
  stage: int = 0
  train_step: int = 0
  complete: bool = True
  dense: dict[str, float] = dataclasses.field(default_factory=dict)
  tasks: Tasks = dataclasses.field(default_factory=dict)
  rows: list[StageReport] = dataclasses.field(default_factory=list)
  row: StageReport | None = None
  seconds: float = 0.0
  compiles: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def params(self) -> Params:
    return self.arrays['params']

  def record_tasks(self, of: Of, scores: dict[str, dict[str, Any]]) -> None:
    self.tasks = self.tasks | {of: scores}

  def hold(self, arrays: TrainState) -> None:
    """Sets the arrays, as loaded, restored or changed between two events."""
    self.arrays = _bound(arrays)

  def compacted_to_plan(self, arrays: TrainState) -> None:
    """Sets the arrays, which now have the widths of the current plan."""
    self.arrays, self.compacted = _bound(arrays), self.pruning.plan

  def open_stage(self, row: StageReport) -> None:
    """Records that a stage is pruned; its training is next."""
    self.stage, self.complete, self.row = row['stage'], False, row

  def trained_to(self, step: int, arrays: TrainState) -> None:
    """Records that training has reached global step `step`."""
    self.arrays, self.train_step = arrays, step

  def record_seconds(self, seconds: float) -> None:
    """Records the time that the open stage has taken so far."""
    if self.row is not None:
      self.row = self.row | {'seconds': seconds}

  def close_stage(self, row: StageReport) -> None:
    """Records that the stage is trained and measured."""
    self.rows, self.row, self.complete = [*self.rows, row], None, True


def _bound(arrays: TrainState) -> TrainState:
  """The arrays bound to their device, as restored ones are: then a resumed run uses the same programs."""
  return jax.device_put(arrays, jax.devices()[0]) if mesh() is None else arrays


_IN_JSON = ('stage', 'train_step', 'complete', 'dense', 'tasks', 'rows', 'seconds', 'compiles')


def array_shapes(
  model: DenseModel, plan: PrunePlan, optimizer: optax.GradientTransformation | None, trained: bool
) -> Any:
  """Shapes, dtypes and shardings of a run's arrays at the plan's widths; `optimizer` if it trains.

  Training and healing use fp32 master weights; pruning alone keeps each tensor's own dtype.
  """

  def arrays(params: Params) -> TrainState:
    cut = surgery.compact(params, plan)
    return {'params': cut} | ({'optimizer': optimizer.init(cut)} if optimizer else {})

  dense = model.abstract_params(jnp.float32 if trained else None)
  return placed(jax.eval_shape(arrays, dense))


def from_meta(meta: dict[str, Any], config: ModelConfig) -> RunState:
  """The state that a checkpoint's JSON describes, without its arrays; `config` is the dense model's."""
  pruning = PruneState.from_json(meta['pruning'], config)
  fields = {name: meta[name] for name in _IN_JSON} | {'row': meta['row'] or None}
  return RunState({}, pruning.plan, pruning, **fields)


class StateStore:
  """Saves and resumes a `RunState` in its workdir.

  Args:
    workdir: directory of the run.
    config: config of the dense model, whose numbering plans use.
    metrics: the log; when resuming, it is cut to the lines that the saved state includes.
    unit: what pruning removes from attention.
  """

  def __init__(
    self, workdir: Workdir, config: ModelConfig, metrics: MetricsLog, unit: AttentionUnit = KV_GROUPS
  ):
    self._plan, self._config, self._unit, self._metrics = workdir.plan, config, unit, metrics
    self._checkpoints = Checkpoints(workdir.checkpoints)

  def save(self, state: RunState) -> None:
    """Saves a checkpoint; only between prunings, when the arrays have the plan's widths."""
    meta = {name: getattr(state, name) for name in _IN_JSON} | {'row': state.row or {}}
    meta |= {'pruning': state.pruning.to_json(), 'metrics_lines': self._metrics.lines}
    with phase('saving'):
      self._checkpoints.save(state.arrays, meta)

  def save_plan(self, state: RunState, stage: int, finished: bool = False) -> None:
    """Writes `plan.json`: the groups kept now, and the data to resume in the middle of a stage's pruning.

    finished: the run is; without its report it starts over, since its log has more than this stage's pruning.
    """
    plan = {
      'stage': stage,
      'finished': finished,
      'params': state.pruning.plan.params(self._config),
      'dense': state.dense,
      'tasks': state.tasks,
      'metrics_lines': self._metrics.lines,
    }
    plan |= state.pruning.to_json()
    if is_first():
      write_text(self._plan, json.dumps(plan | {'checksum': json_checksum(plan)}) + '\n')

  def resume(self, shapes: Callable[[PrunePlan], Any], start: Callable[[], TrainState]) -> RunState:
    """The state that was saved last.

    Args:
      shapes: plan -> the arrays' tree of `jax.ShapeDtypeStruct` at its widths.
      start: returns the arrays of a run without a checkpoint.
    """
    number, lines = decide(self._checkpoints.latest), 0
    if number is None:
      dense = PruneState.start(self._config, self._unit)
      state = RunState({}, dense.plan, dense)
      state.hold(start())
    else:
      meta = self._checkpoints.meta(number)
      state, lines = from_meta(meta, self._config), meta['metrics_lines']
      state.hold(self._checkpoints.restore(number, shapes(state.compacted)))
      say(f'resuming at stage {state.stage}, training step {state.train_step}')
    if state.complete and decide(self._plan.exists):
      lines = self._resume_pruning(state, lines)
    self._metrics.cut(lines)
    return state

  def _resume_pruning(self, state: RunState, lines: int) -> int:
    """Applies the steps in plan.json if they belong to the next stage; returns the log's length."""
    remedy = 'delete it to start this stage again'
    with reading('', self._plan, remedy):
      saved = decide(lambda: read_json(self._plan, remedy))
      if saved.pop('checksum') != json_checksum(saved):
        raise ValueError('the checksum differs')
      if saved['stage'] != state.stage + 1 or saved.get('finished'):
        return lines
      state.pruning, state.dense = PruneState.from_json(saved, self._config), saved['dense']
      for of, scores in saved['tasks'].items():
        state.record_tasks(of, scores)
    say(f'resuming the pruning of stage {saved["stage"]}, after step {saved["step"]}')
    return int(saved['metrics_lines'])

  def finish(self, exported: bool) -> None:
    """Removes the checkpoints that no later mode reads: all if the model was `exported`, else the older ones.

    Call it after `close`, when the report is written.
    """
    decide(lambda: self._checkpoints.keep(0 if exported else 1))

  def check(self) -> None:
    """Raises the error of a checkpoint that is written beside training."""
    self._checkpoints.check()

  def close(self) -> None:
    self._checkpoints.close()
