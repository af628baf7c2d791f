"""Adapt-Accel: stages of prune and recover (paper section 4)."""

import dataclasses
import json
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp

from adapt_jax import report_html, surgery
from adapt_jax.compile import Compiler
from adapt_jax.config import RunOptions
from adapt_jax.evaluate import Evaluator
from adapt_jax.export.hf import write_hf
from adapt_jax.inputs import Inputs, prepare
from adapt_jax.metrics import MetricsLog
from adapt_jax.optim import optimizer, reset_moments
from adapt_jax.plan import PrunePlan, PruneState
from adapt_jax.prune import Pruner, StepRecord, target_params
from adapt_jax.report import table, versions
from adapt_jax.run_state import RunState, StateStore
from adapt_jax.sharing import Shared
from adapt_jax.train import Teacher, TrainState, make_step, run_steps, stage_steps
from adapt_jax.workdir import Workdir
from models.config import ModelConfig, count_params
from models.files import write_text


def stage_targets(config: ModelConfig, target: float, stages: int, rule: str) -> list[int]:
  """Parameters at the end of each stage: linear P0 − (P0 − P*)·k/N, geometric P0·(P*/P0)^(k/N)."""
  dense, last = count_params(config), target_params(config, target)
  shares = [k / stages for k in range(1, stages)]
  if rule == 'linear':
    return [int(dense - (dense - last) * x) for x in shares] + [last]
  return [int(dense * (last / dense) ** x) for x in shares] + [last]


def dense_key(options: RunOptions) -> Any:
  """All that the dense model's perplexity depends on, for `Shared.dense`."""
  # Biases that a run adds are zeros, but its program may round otherwise.
  return options.model, options.data, options.evaluate, options.prune.compensate == 'bias'


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Modes accel and prune: runs or resumes, then prints the table."""
  inputs = prepare(options)
  workdir.claim()
  report = Run(options, inputs, workdir, command).execute()
  print(table(report, str(workdir.hf)))


class Run:
  """One run of mode accel or prune in its workdir.

  Args:
    options: checked options.
    inputs: model, tokenizer and token blocks, opened and checked.
    workdir: claimed.
    command: that reproduces the run, for its report.
    shared: with other runs of this process on the same model.
    export: whether to write hf/.
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
    self._shared, self._export = shared, export
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
    self._evaluator = None
    if inputs.evaluate is not None:
      self._evaluator = Evaluator(inputs.evaluate, options.evaluate.batch, **common)
    self._teacher = None
    if inputs.train is not None and options.train.distill.alpha > 0:
      self._teacher = Teacher(inputs.source.config, inputs.source.load_params(inputs.dtype))

  def execute(self) -> dict[str, Any]:
    """Runs or resumes all stages, writes hf/ and report.json; returns the report."""
    state = self._store.resume(self._array_shapes, self._start)
    self._before = state.seconds, dict(state.compiles)
    if state.dense_perplexity is None:
      state.dense_perplexity = self._evaluate_dense(state)
    for stage in range(max(state.stage, 1), self.options.prune.stages + 1):
      if state.stage < stage:
        self._prune_stage(stage, state)
      if not state.complete:
        self._recover_stage(stage, state)
    self.close()
    return self._finish(state)

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
    dense = self.inputs.abstract_params(self._stored_dtype())
    return jax.eval_shape(lambda p: self._with_optimizer(surgery.compact(p, plan)), dense)

  def _save(self, state: RunState) -> None:
    state.seconds = self._before[0] + time.monotonic() - self._started
    names = ('scoring', 'compensation', 'training', 'evaluation')
    state.compiles = {n: self._before[1].get(n, 0) + self._compiler.counts.get(n, 0) for n in names}
    self._store.save(state)
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

    target = self._targets[stage - 1]
    state.pruning = self._pruner.prune(
      state.arrays['params'], state.compacted, state.pruning, target, on_step, f'stage {stage} prune'
    )
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

    state.arrays = jax.block_until_ready(jax.jit(cut)(state.arrays))
    state.compacted = state.pruning.plan
    if 'optimizer' not in state.arrays:
      state.arrays = self._with_optimizer(state.arrays['params'])
    # Flax checks shapes too, but only while tracing; a wrong plan must not get as far as that.
    chex.assert_trees_all_equal_shapes(state.arrays, self._array_shapes(state.compacted))
    jax.clear_caches()  # programs of the old shapes would stay in memory

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

    def on_save(step: int, arrays: TrainState) -> None:
      state.arrays, state.train_step = arrays, step
      state.row = state.row | {'seconds': seconds + time.monotonic() - start}
      self._save(state)

    state.arrays = run_steps(
      state.arrays,
      self._compile_step(state),
      self.inputs.train,
      self.options.train,
      seed=self.options.seed,
      start=state.train_step,
      stop=stop,
      total=self._ends[-1],
      teacher=self._teacher,
      on_metrics=lambda step, m: self._metrics.write('train', stage=stage, step=step + 1, **m),
      on_save=on_save,
      title=f'stage {stage} recover',
    )
    state.train_step = stop

  def _compile_step(self, state: RunState) -> Any:
    t, teacher = self.options.train, self._teacher
    step = make_step(
      self._config(state), t, self._optimizer, self.inputs.dtype, teacher.config if teacher else None
    )
    batch = [jax.ShapeDtypeStruct((t.batch, t.length), dtype) for dtype in (jnp.int32, jnp.bool_)]
    teachers = (teacher.params,) if teacher else ()
    return self._compiler('training', step, state.arrays, *batch, *teachers, donate_argnums=(0,))

  def _evaluate_dense(self, state: RunState) -> float | None:
    """Measured once by all runs that share it."""
    key, known = dense_key(self.options), self._shared.dense if self._shared else {}
    if key in known:
      self._metrics.write('evaluate', of='dense', step=state.train_step, perplexity=known[key])
      return known[key]
    value = self._evaluate(self.inputs.config, state, 'dense')
    if value is not None:
      known[key] = value
    return value

  def _evaluate(self, config: ModelConfig, state: RunState, title: str) -> float | None:
    if self._evaluator is None:
      return None
    value = self._evaluator.perplexity(config, state.arrays['params'], f'{title}: evaluate')
    self._metrics.write('evaluate', of=title, step=state.train_step, perplexity=value)
    return value

  # -- the end --------------------------------------------------------------------------------------

  def _export_dtype(self) -> Any:
    """dtype of the saved weights; None keeps each tensor's own, where no training has made them fp32."""
    wanted = self.options.export.dtype
    if wanted == 'auto' and self.inputs.train is None:
      return None
    return jnp.dtype(self.inputs.source.dtype if wanted == 'auto' else wanted)

  def _round_to_export(self, state: RunState) -> None:
    """So that the last perplexity is that of the weights as they are saved."""
    dtype = self._export_dtype()
    if dtype is None:
      return
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), state.arrays['params'])
    state.arrays = state.arrays | {'params': rounded}

  def _finish(self, state: RunState) -> dict[str, Any]:
    config = self._config(state)
    if self._export:
      write_hf(
        config,
        state.arrays['params'],
        self.workdir.hf,
        tokenizer=self.inputs.tokenizer,
        dtype=self._export_dtype(),
        generation=self.inputs.source.generation,
      )
    self._store.save_plan(state, self.options.prune.stages)
    report = self._report(state)
    self._write_page(state, running=False)
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
        'definition': self._evaluator.definition if self._evaluator else None,
      },
      'schedule': {
        'targets': self._targets,
        'train_steps': self._ends[-1],
        'tokens_per_step': options.train.batch * options.train.length,
      },
      'stages': rows,
      'command': self._command,
      'compiles': state.compiles,
      'seconds': state.seconds,
      'versions': versions(),
    }

  def _write_page(self, state: RunState, running: bool = True) -> None:
    report_html.write(
      self.workdir.page, self._report(state), self._metrics.read(), command=self._command, running=running
    )
