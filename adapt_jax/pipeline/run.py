"""One run of Adapt-Accel in its workdir: stages, measurements, checkpoints, resume, exports and report."""

import contextlib
import dataclasses
import time

from jax import process_count

from adapt_jax.config.identity import settings
from adapt_jax.config.units import duration
from adapt_jax.machine import preemption
from adapt_jax.machine.preemption import Preempted
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.pipeline.base_run import BaseRun
from adapt_jax.pipeline.dense_model import with_learning_rate
from adapt_jax.pipeline.run_report import first, with_recovered
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pipeline.shared import Shared
from adapt_jax.pipeline.stages import Pruning, Recovery
from adapt_jax.pipeline.state import RunState, StateStore
from adapt_jax.pruning.pruner import StepRecord
from adapt_jax.reports.report import Of, RunReport, StageReport
from adapt_jax.training.loop import Trained
from adapt_jax.training.optim import optimizer


class Run(BaseRun):
  """One run of mode accel, prune or recover in its workdir: stages, checkpoints and resume."""

  def _prepare(self, shared: Shared | None) -> None:
    inputs, self._estimated, self._saving_seconds = self._inputs, False, 0.0
    self.options = with_learning_rate(self.options, inputs.source)
    self._store = StateStore(self._workdir, inputs.config, self._metrics, inputs.budget.removes)
    self._schedule = Schedule.of(self.options, inputs.budget)
    tx = optimizer(self.options.train, self._schedule.train_steps) if self._trains else None
    args = self.options, inputs, self._schedule
    self._pruning = Pruning(*args, tx, compiler=self._compiler, shared=shared)
    self._recovery = Recovery(*args, tx, compiler=self._compiler) if tx else None

  def execute(self) -> RunReport:
    """Runs or resumes all stages, writes the exports and report.json; returns the report.

    Raises `Preempted` after SIGTERM, with all training saved.
    """
    if self._recovery is not None:
      with preemption.deferred():
        self._recovery.prepare(self._workdir.teacher)
    state = self._store.resume(self._pruning.shapes, self._pruning.start)
    with preemption.deferred():
      self._pruning.prepare(state)
    decide(lambda: self._metrics.track(self.options.tracker, settings(self.options)))
    self._before, self._saved_step = (state.seconds, dict(state.compiles)), state.train_step
    with preemption.deferred():
      try:
        self._run_stages(state)
      except Preempted:
        if state.train_step > self._saved_step:  # a stage was trained but not evaluated
          self._save(state)
        self.close()  # the last checkpoint may still be written
        raise Preempted(self._position(state)) from None
      except Exception as error:  # any, raised again
        if process_count() == 1 or isinstance(error, InputError):  # of other errors not all processes know
          with contextlib.suppress(Exception):
            self._store.close()  # as above
        raise
      decide(self._metrics.close)  # W&B may upload for long
      self.close()
      return self._finish(state)

  def close(self) -> None:
    """Closes checkpoints and trackers; only needed if `execute`, which does it itself, has failed."""
    try:
      self._store.close()
    finally:
      self._metrics.close()

  def _run_stages(self, state: RunState) -> None:
    if not state.stage:
      self._measure_reference(state)
    for stage in range(max(state.stage, 1), self._schedule.stages + 1):
      if state.stage < stage:
        self._prune_stage(stage, state)
      preemption.check()
      if not state.complete:
        self._recover_stage(stage, state)
      preemption.check()

  def _measure_reference(self, state: RunState) -> None:
    """Measures what results are compared with, as far as it is not known."""
    reference, config, params = self._inputs.reference, self._config(state), state.params
    if reference is not self._inputs.model:
      config, params = reference.config, reference.load_params(self._inputs.dtype)
    if not state.dense:
      state.dense = self._quality.perplexity(config, params, 'dense', 0, 0)
    if self._measure_tasks(state, config, params, 'dense'):
      self._store.save_plan(state, 1)

  def _position(self, state: RunState) -> str:
    stage = min(state.stage + state.complete, self._schedule.stages)
    return f'at stage {stage}, pruning step {state.pruning.step}, training step {state.train_step}'

  # -- one stage ------------------------------------------------------------------------------------

  def _prune_stage(self, stage: int, state: RunState) -> None:
    """Prunes to the stage's target, compacts, measures and saves."""
    start, last, budget = time.monotonic(), stage == self._schedule.stages, self._inputs.budget

    def after_step(record: StepRecord) -> None:
      self._metrics.write('prune', stage=stage, **dataclasses.asdict(record))
      self._store.save_plan(state, stage)
      self._write_page(state)
      preemption.check()

    def after_healing(done: Trained) -> None:
      self._metrics.write('heal', stage=stage, step=done.step, **done.metrics)

    self._pruning.prune(stage, state, after_step, after_healing)
    if last and not self._trains:
      self._round_to_export(state)
    perplexity = self._perplexity(state, 'pruned', stage, last=last and not self._trains)
    if last:
      self._tasks(state, 'pruned')
    row: StageReport = {
      'stage': stage,
      'target': budget.number(self._schedule.target(stage)),
      'params': count_params(self._config(state)),
      'perplexity_pruned': first(perplexity),
      'texts': {name: {'pruned': value} for name, value in perplexity.items()},
      'seconds': time.monotonic() - start,
    }
    if budget.kind != 'params':
      row['cost'] = budget.number(state.compacted.cost(budget))
    state.open_stage(row)
    self._save(state)

  def _recover_stage(self, stage: int, state: RunState) -> None:
    """Trains on the rest of the stage's share of the data, measures and saves."""
    assert state.row is not None
    start, last = time.monotonic() - state.row['seconds'], stage == self._schedule.stages
    recovered: dict[str, float] = {}
    if self._recovery is not None:
      self._train(stage, state, self._recovery, start)
      if last:
        self._round_to_export(state)
      recovered = self._perplexity(state, 'recovered', stage, last=last)
      if last:
        self._tasks(state, 'recovered')
    steps = state.train_step - self._schedule.start(stage)
    row: StageReport = {
      **state.row,
      **state.compacted.widths(self._inputs.config),
      'perplexity_recovered': first(recovered),
      'texts': with_recovered(state.row, recovered),
      'tokens': steps * self.options.train.batch * self.options.train.length,
      'seconds': time.monotonic() - start,
    }
    state.close_stage(row)
    self._save(state)

  def _train(self, stage: int, state: RunState, recovery: Recovery, start: float) -> None:
    """Trains the stage, with saves in between; `start`: when the stage began, counting its earlier work."""
    first, pruning = state.train_step, time.monotonic() - start
    fresh = first == self._schedule.start(stage)  # else `start` counts training too
    for done in recovery.steps(stage, state):
      self._store.check()
      if not self._estimated and done.step > first + 1:  # the first step may be slower
        self._estimate(stage, done, pruning if fresh else None)
      self._metrics.write('train', stage=stage, step=done.step, **done.metrics)
      if done.state is not None:
        state.record_seconds(time.monotonic() - start)
        self._save(state)  # also at the end, since the stage's measurements may take long, and fail

  def _estimate(self, stage: int, done: Trained, seconds: float | None) -> None:
    """Reports the run's expected time, after two training steps; `seconds`: a stage's pruning, if known.

    It counts evaluations as long as the last one, of which the comparison with the dense model takes one and
    all else at the end one more, and the writing of the model as long as the last checkpoint.
    """
    self._estimated = True
    if not (steps := self._schedule.train_steps - done.step):
      return
    step = self.options.train.batch * self.options.train.length / done.metrics['tokens_per_second']
    stages, evaluations = self._schedule.stages - stage, self._schedule.stages - stage + 3
    measured = evaluations * self._quality.seconds + self._saving_seconds
    total = duration(steps * step + measured + stages * (seconds or 0))
    times = [f'{step:.1f} s for each of {steps:,} training steps']
    if measured >= 1:
      times.append(f'{duration(measured)} for evaluation and export')
    if stages:
      prunings = f'{stages} more {"pruning" if stages == 1 else "prunings"}'
      times.append(f'without {prunings}' if seconds is None else f'{seconds:.0f} s each for {prunings}')
    say(f'the run will take about {total} more: {", ".join(times)}')

  def _perplexity(self, state: RunState, of: Of, stage: int, *, last: bool = False) -> dict[str, float]:
    args = self._config(state), state.params, of, stage, state.train_step
    return self._quality.perplexity(*args, last=last)

  def _tasks(self, state: RunState, of: Of) -> bool:
    return self._measure_tasks(state, self._config(state), state.params, of)

  def _config(self, state: RunState) -> ModelConfig:
    return state.compacted.pruned_config(self._inputs.config)

  # -- files ----------------------------------------------------------------------------------------

  def _save(self, state: RunState) -> None:
    self._record_cost(state)
    start = time.monotonic()
    self._store.save(state)
    self._saving_seconds = time.monotonic() - start
    self._saved_step = state.train_step
    self._write_page(state)

  def _record_cost(self, state: RunState) -> None:
    seconds, compiles = self._before
    names = ['scoring', 'compensation', 'training', 'evaluation']
    names += ['divergence'] if self._inputs.evaluate else []
    names += ['prefill', 'decode'] if self.options.evaluate.health else []
    names += ['teacher'] if self._trains and self.options.train.distill.kept_ids else []
    names += ['teacher', 'healing'] if self.options.prune.heal else []
    names += ['harness', 'prefill', 'decode'] if self.options.evaluate.has_tasks else []
    state.compiles = {n: compiles.get(n, 0) + self._compiler.counts.get(n, 0) for n in names}
    state.seconds = seconds + time.monotonic() - self._started

  def _write_page(self, state: RunState) -> None:
    self._page(self._report(state), running=True)

  def _round_to_export(self, state: RunState) -> None:
    state.hold(state.arrays | {'params': self._rounded(self._config(state), state.params)})

  def _finish(self, state: RunState) -> RunReport:
    self._store.save_plan(state, self._schedule.stages, finished=True)
    self._recovery = None  # the teacher and the optimizer's moments make room for the dense model
    state.hold({'params': state.params})
    report = self._end(state, self._config(state), state.params)
    if self._export:
      self._store.finish('hf' in report['exports'])
    return report
