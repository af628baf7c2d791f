"""Adapt-Accel: stages of prune and recover (paper section 4)."""

import dataclasses
import json
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp

from adapt_jax.config.options import RunOptions
from adapt_jax.evaluation.harness import check_tasks
from adapt_jax.export.writer import Writer, written_dtype
from adapt_jax.machine import mesh, preemption
from adapt_jax.machine.compiler import Compiler, forget_traces
from adapt_jax.machine.preemption import Preempted
from adapt_jax.machine.processes import is_first, say
from adapt_jax.pipeline.inputs import Inputs, load_source, prepare
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.quality import Quality
from adapt_jax.pipeline.shared import Shared
from adapt_jax.pipeline.state import RunState, StateStore
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner, StepRecord, target_params
from adapt_jax.reports import run_page
from adapt_jax.reports.summary import settings, table, versions
from adapt_jax.training.optim import optimizer, reset_moments
from adapt_jax.training.step import Teacher, TrainState, make_step, run_steps, stage_steps
from models.config import ModelConfig, count_params
from models.files import write_text
from models.network.sharding import placed, row_sharding


def stage_targets(config: ModelConfig, target: float, stages: int, rule: str) -> list[int]:
  """Parameters at the end of each stage: linear P0 − (P0 − P*)·k/N, geometric P0·(P*/P0)^(k/N)."""
  dense, last = count_params(config), target_params(config, target)
  shares = [k / stages for k in range(1, stages)]
  if rule == 'linear':
    return [int(dense - (dense - last) * x) for x in shares] + [last]
  return [int(dense * (last / dense) ** x) for x in shares] + [last]


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Modes accel and prune: runs or resumes, then prints the table."""
  check_tasks(options.evaluate)
  inputs = prepare(options)
  workdir.claim()
  report = Run(options, inputs, workdir, command).execute()
  say(table(report))


class Run:
  """One run of mode accel or prune in its workdir.

  Args:
    options: checked options.
    inputs: model, tokenizer and token blocks, opened and checked.
    workdir: claimed.
    command: that reproduces the run, for its report.
    shared: with other runs of this process on the same model.
    export: whether to write the model.
  """

  def __init__(
    self,
    options: RunOptions,
    inputs: Inputs,
    workdir: Workdir,
    command: str,
    *,
    shared: Shared | None = None,
    export: bool = True,
  ):
    self.options, self.inputs, self.workdir = options, inputs, workdir
    self._export = export
    self._started = time.monotonic()
    self._command = command
    self._compiler = Compiler(shared.programs if shared else None)
    self._metrics = MetricsLog(workdir.metrics)
    self._store = StateStore(workdir, inputs.config, self._metrics)
    prune = options.prune
    self._targets = stage_targets(inputs.source.config, prune.target, prune.stages, prune.stage_targets)
    self._ends = stage_steps(options.train, prune.stages)
    self._optimizer = optimizer(options.train, self._ends[-1])
    common: dict[str, Any] = {'compiler': self._compiler, 'dtype': inputs.dtype}
    memo = shared.scores if shared else None
    self._pruner = Pruner(inputs.config, prune, inputs.calibration, seed=options.seed, memo=memo, **common)
    self._quality = Quality(options, inputs, self._metrics, shared or Shared(), compiler=self._compiler)
    self._teacher = None
    if inputs.train is not None and options.train.distill.alpha > 0:
      self._teacher = Teacher(inputs.source.config, load_source(inputs.source, inputs.dtype))

  def execute(self) -> dict[str, Any]:
    """Runs or resumes all stages, writes the exports and report.json; returns the report.

    Raises `Preempted` after SIGTERM, with all training saved.
    """
    state = self._store.resume(self._array_shapes, self._start)
    self._before, self._saved_step = (state.seconds, dict(state.compiles)), state.train_step
    with preemption.deferred():
      try:
        self._run_stages(state)
      except Preempted:
        if state.train_step > self._saved_step:  # a stage's training was over, its evaluation not
          self._save(state)
        raise Preempted(self._position(state)) from None
      self.close()
      return self._finish(state)

  def _run_stages(self, state: RunState) -> None:
    if state.dense_perplexity is None:
      state.dense_perplexity = self._evaluate(self.inputs.config, state, 'dense')
    if self._evaluate_tasks(state, 'dense'):
      self._store.save_plan(state, 1)
    for stage in range(max(state.stage, 1), self.options.prune.stages + 1):
      if state.stage < stage:
        self._prune_stage(stage, state)
      preemption.check()
      if not state.complete:
        self._recover_stage(stage, state)
      preemption.check()

  def _position(self, state: RunState) -> str:
    stage = min(state.stage + state.complete, self.options.prune.stages)
    return f'at stage {stage}, pruning step {state.pruning.step}, training step {state.train_step}'

  def close(self) -> None:
    """Ends writing checkpoints; `execute` does it, so only after it has failed."""
    self._store.close()

  # -- the state ------------------------------------------------------------------------------------

  def _start(self) -> TrainState:
    """The dense parameters; moments come with the first stage, whose model is smaller."""
    return {'params': self.inputs.load_params(self._stored_dtype())}

  def _stored_dtype(self) -> Any:
    """fp32 master weights for training; for pruning alone each tensor's own dtype (None)."""
    return jnp.float32 if self.inputs.train is not None else None

  def _with_optimizer(self, params: Any) -> TrainState:
    if self.inputs.train is None:
      return {'params': params}
    return {'params': params, 'optimizer': self._optimizer.init(params)}

  def _array_shapes(self, plan: PrunePlan) -> Any:
    """Shapes, dtypes and places of the state at the plan's widths."""
    dense = self.inputs.abstract_params(self._stored_dtype())
    return placed(jax.eval_shape(lambda p: self._with_optimizer(surgery.compact(p, plan)), dense))

  def _save(self, state: RunState) -> None:
    state.seconds = self._before[0] + time.monotonic() - self._started
    names = ['scoring', 'compensation', 'training', 'evaluation']
    names += self._if_tasks('harness', 'prefill', 'decode')
    state.compiles = {n: self._before[1].get(n, 0) + self._compiler.counts.get(n, 0) for n in names}
    self._store.save(state)
    self._saved_step = state.train_step
    self._write_page(state)

  def _config(self, state: RunState) -> ModelConfig:
    return state.compacted.pruned_config(self.inputs.config)

  # -- one stage ------------------------------------------------------------------------------------

  def _prune_stage(self, stage: int, state: RunState) -> None:
    """Prunes to the stage's target, compacts, evaluates and saves."""
    start = time.monotonic()

    def on_step(pruning: PruneState, record: StepRecord) -> None:
      state.pruning = pruning
      self._metrics.write('prune', stage=stage, **dataclasses.asdict(record))
      self._store.save_plan(state, stage)
      self._write_page(state)
      preemption.check()

    target = self._targets[stage - 1]
    if state.pruning.plan.params(self.inputs.config) > target:
      stacked = self._pruner.stack(state.arrays['params'], state.compacted)
      if stage == 1:  # nothing has trained them: read again below, so that scoring holds them but once
        del state.arrays['params']
      state.pruning = self._pruner.prune(
        stacked, state.compacted, state.pruning, target, on_step, f'stage {stage} prune'
      )
      del stacked
      if stage == 1:
        state.arrays = self._start()
    # On the rows of the last step; done again, to the same bits, if killed before the stage is saved.
    state.arrays['params'] = self._pruner.compensate(
      state.arrays['params'], state.compacted, state.pruning.plan, state.pruning.step - 1
    )
    self._compact(state)
    if stage > 1 and self.inputs.train is not None and self.options.train.optimizer_state == 'reset':
      state.arrays['optimizer'] = reset_moments(state.arrays['optimizer'])
    if stage == self.options.prune.stages and self.inputs.train is None:
      self._round_to_export(state)
    config = self._config(state)
    perplexity = self._evaluate(config, state, f'stage {stage} pruned')
    if stage == self.options.prune.stages:
      self._evaluate_tasks(state, 'pruned')
    state.row = {
      'stage': stage,
      'target': target,
      'params': count_params(config),
      'perplexity_pruned': perplexity,
      'seconds': time.monotonic() - start,
    }
    state.stage, state.complete = stage, False
    state.pruning = self._pruner.next_stage(state.pruning)
    self._save(state)

  def _compact(self, state: RunState) -> None:
    relative = state.pruning.plan.relative_to(state.compacted)

    def cut(arrays: TrainState) -> TrainState:
      return surgery.compact_optimizer(arrays, arrays['params'], relative)

    state.arrays = jax.block_until_ready(mesh.jit(cut, state.arrays, once=True)(state.arrays))
    state.compacted = state.pruning.plan
    if 'optimizer' not in state.arrays and self.inputs.train is not None:
      params = state.arrays['params']
      state.arrays['optimizer'] = mesh.jit(self._optimizer.init, params, once=True)(params)
    # Flax checks shapes too, but only while tracing; a wrong plan must not get as far as that.
    chex.assert_trees_all_equal_shapes(state.arrays, self._array_shapes(state.compacted))
    forget_traces()  # programs of the old shapes would stay in memory

  def _recover_stage(self, stage: int, state: RunState) -> None:
    """Trains on the rest of the stage's share, evaluates and saves."""
    start, seconds = time.monotonic(), state.row['seconds']
    if self.inputs.train is not None:
      self._train(stage, state, self._ends[stage - 1])
      if stage == self.options.prune.stages:
        self._round_to_export(state)
    first, recovered = self._ends[stage - 2] if stage > 1 else 0, None
    if self.inputs.train is not None:
      recovered = self._evaluate(self._config(state), state, f'stage {stage} recovered')
      if stage == self.options.prune.stages:
        self._evaluate_tasks(state, 'recovered')
    row = state.row | state.compacted.widths(self.inputs.config)
    row |= {
      'perplexity_recovered': recovered,
      'tokens': (state.train_step - first) * self.options.train.batch * self.options.train.length,
      'seconds': seconds + time.monotonic() - start,
    }
    state.rows, state.row, state.complete = [*state.rows, row], {}, True
    self._save(state)

  def _train(self, stage: int, state: RunState, stop: int) -> None:
    if state.train_step >= stop or self.inputs.train is None:
      return
    start, seconds = time.monotonic(), state.row['seconds']

    def reached(step: int, arrays: TrainState) -> None:
      state.arrays, state.train_step = arrays, step
      state.row = state.row | {'seconds': seconds + time.monotonic() - start}

    def on_save(step: int, arrays: TrainState) -> None:
      reached(step, arrays)
      self._save(state)

    arrays = run_steps(
      state.arrays,
      self._compile_step(state),
      self.inputs.train,
      self.options.train,
      start=state.train_step,
      stop=stop,
      total=self._ends[-1],
      teacher=self._teacher,
      on_metrics=lambda step, m: self._metrics.write('train', stage=stage, step=step + 1, **m),
      on_save=on_save,
      title=f'stage {stage} recover',
    )
    reached(stop, arrays)

  def _compile_step(self, state: RunState) -> Any:
    t, teacher = self.options.train, self._teacher
    step = make_step(
      self._config(state), t, self._optimizer, self.inputs.dtype, teacher.config if teacher else None
    )
    shape, split = (t.batch, t.length), row_sharding()
    dtypes = (jnp.int32, jnp.bool_, jnp.int32)
    batch = [jax.ShapeDtypeStruct(shape, dtype, sharding=split) for dtype in dtypes]
    teachers = (teacher.params,) if teacher else ()
    program = self._compiler('training', step, state.arrays, *batch, *teachers, donate_argnums=(0,))
    forget_traces()
    return program

  def _evaluate(self, config: ModelConfig, state: RunState, title: str) -> float | None:
    return self._quality.perplexity(config, state.arrays['params'], title, state.train_step)

  def _evaluate_tasks(self, state: RunState, of: str) -> bool:
    """Scores 'dense', 'pruned' or 'recovered' into the state; False if they are there, or not asked for."""
    if not self.options.evaluate.has_tasks or of in state.tasks:
      return False
    scores = self._quality.tasks(self._config(state), state.arrays['params'], of, state.train_step)
    state.tasks = state.tasks | {of: scores}
    return True

  # -- the end --------------------------------------------------------------------------------------

  def _export_dtype(self) -> Any:
    trained = self.inputs.train is not None
    return written_dtype(self.options.export, self.inputs.source.dtype, trained)

  def _round_to_export(self, state: RunState) -> None:
    """So that the last perplexity is that of the weights as they are saved."""
    dtype = self._export_dtype()
    if dtype is None:
      return
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), state.arrays['params'])
    state.arrays = state.arrays | {'params': rounded}

  def _finish(self, state: RunState) -> dict[str, Any]:
    self._store.save_plan(state, self.options.prune.stages)
    report = self._report(state)
    if self._export:
      writer = Writer(
        self.options.export,
        self.workdir,
        tokenizer=self.inputs.tokenizer,
        dtype=self._export_dtype(),
        generation=self.inputs.source.generation,
        report=report,
      )
      report['exports'] = writer.write(self._config(state), state.arrays['params'])
    self._write_page(state, running=False)
    if is_first():
      write_text(self.workdir.report, json.dumps(report, indent=2) + '\n')
    return report

  def _report(self, state: RunState) -> dict[str, Any]:
    """What report.json says at the end; before it, with the open stage as far as it is known."""
    config, options = self.inputs.config, self.options
    rows = [*state.rows, state.row] if state.row else state.rows
    last = rows[-1] if rows else {}
    dense = count_params(self.inputs.source.config)
    return {
      'model': {
        'source': self.inputs.source.name,
        'params_before': dense,
        'params_after': last.get('params', dense),
        'params_target': self._targets[-1],
        'num_heads': [s.num_heads for s in config.layers],
        'num_kv_heads': [s.num_kv_heads for s in config.layers],
        'ffn': [s.ffn for s in config.layers],
      },
      'perplexity': {
        'dense': state.dense_perplexity,
        'pruned': last.get('perplexity_pruned'),
        'recovered': last.get('perplexity_recovered'),
        'definition': self._quality.definition,
      },
      'tasks': state.tasks,
      'schedule': {
        'targets': self._targets,
        'train_steps': self._ends[-1],
        'tokens_per_step': options.train.batch * options.train.length,
      },
      'stages': rows,
      **settings(options),
      'command': self._command,
      'compiles': state.compiles,
      'seconds': state.seconds,
      'versions': versions(*self._if_tasks('lm_eval')),
    }

  def _if_tasks(self, *names: str) -> tuple[str, ...]:
    return names if self.options.evaluate.has_tasks else ()

  def _write_page(self, state: RunState, running: bool = True) -> None:
    if is_first():
      run_page.write(
        self.workdir.page, self._report(state), self._metrics.read(), command=self._command, running=running
      )
