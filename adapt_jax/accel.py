"""Adapt-Accel: stages of prune and recover, as one state that is saved together and resumed.

Paper section 4. What survives a kill: the newest checkpoint (weights, moments, position, history) and
`plan.json`, written after every pruning step. Everything else is a function of the config.
"""

import dataclasses
import json
import time
from typing import Any

import chex
import jax
import jax.numpy as jnp

from adapt_jax import surgery
from adapt_jax.checkpoint import Checkpoints
from adapt_jax.compile import Compiler
from adapt_jax.config import RunOptions
from adapt_jax.evaluate import DEFINITION, Evaluator
from adapt_jax.export.hf import write_hf
from adapt_jax.inputs import Inputs, prepare
from adapt_jax.metrics import MetricsLog
from adapt_jax.optim import optimizer, reset_moments
from adapt_jax.prune import Pruner, PruneState, StepRecord, target_params
from adapt_jax.report import table, versions
from adapt_jax.train import Teacher, TrainState, make_step, run_steps, stage_steps
from adapt_jax.workdir import Workdir
from models.config import ModelConfig, count_params
from models.files import write_text
from models.llama import abstract_params


def stage_targets(config: ModelConfig, target: float, stages: int, rule: str) -> list[int]:
  """Parameters at the end of each stage: linear P0 − (P0 − P*)·k/N, geometric P0·(P*/P0)^(k/N)."""
  dense, last = count_params(config), target_params(config, target)
  shares = [k / stages for k in range(1, stages)]
  if rule == 'linear':
    return [int(dense - (dense - last) * x) for x in shares] + [last]
  return [int(dense * (last / dense) ** x) for x in shares] + [last]


@dataclasses.dataclass
class Position:
  """What a checkpoint says besides its arrays."""

  stage: int  # 1-based; 0 before the first
  train_step: int  # global steps done
  complete: bool  # the stage's training is over
  history: dict[str, Any]  # dense perplexity, rows of finished stages, row of the open one, seconds, compiles


def _new_history() -> dict[str, Any]:
  return {'dense': None, 'stages': [], 'open': {}, 'seconds': 0.0, 'compiles': {}}


class Run:
  """One run of mode accel or prune in its workdir.

  Args:
    options: checked options.
    inputs: model, tokenizer and token blocks, opened and checked.
    workdir: claimed.
  """

  def __init__(self, options: RunOptions, inputs: Inputs, workdir: Workdir):
    self.options, self.inputs, self.workdir = options, inputs, workdir
    self.source, self._dtype = inputs.source, inputs.dtype
    self._compiler = Compiler()
    self._started = time.monotonic()
    self._metrics = MetricsLog(workdir.metrics)
    self._checkpoints = Checkpoints(workdir.checkpoints)
    prune = options.prune
    self._targets = stage_targets(inputs.config, prune.target, prune.stages, prune.stage_targets)
    self._ends = stage_steps(options.train, prune.stages)
    self._optimizer = optimizer(options.train, self._ends[-1])
    self._pruner = Pruner(
      inputs.config,
      prune,
      inputs.calibration,
      seed=options.seed,
      compiler=self._compiler,
      dtype=self._dtype,
    )
    self._evaluator = None
    if inputs.evaluate is not None:
      self._evaluator = Evaluator(
        inputs.evaluate, options.evaluate.batch, compiler=self._compiler, dtype=self._dtype
      )
    self._teacher = self._load_teacher()
    self._position = Position(stage=0, train_step=0, complete=True, history=_new_history())

  @property
  def _trains(self) -> bool:
    return self.inputs.train is not None

  def _load_teacher(self) -> Teacher | None:
    if not self._trains or self.options.train.distill.alpha == 0:
      return None
    return Teacher(self.inputs.config, self.source.load_params(self._dtype))

  def execute(self) -> dict[str, Any]:
    """Runs or resumes all stages, writes hf/ and report.json; returns the report."""
    state, pruning = self._resume()
    history = self._position.history
    if history['dense'] is None:
      history['dense'] = self._evaluate(self.inputs.config, state, 'dense')
    for stage in range(max(self._position.stage, 1), self.options.prune.stages + 1):
      if self._position.stage < stage:
        state, pruning = self._prune_stage(stage, pruning, state)
      if not self._position.complete:
        state = self._recover(stage, pruning, state)
    self._checkpoints.close()
    return self._finish(pruning, state)

  # -- resume ---------------------------------------------------------------------------------------

  def _resume(self) -> tuple[TrainState, PruneState]:
    """The state of the newest checkpoint, or of the source if there is none."""
    config = self.inputs.config
    number = self._checkpoints.latest()
    if number is None:
      self._metrics.cut(0)
      params = self.source.load_params(jnp.float32 if self._trains else None)
      return self._fresh_state(params), PruneState.start(config)
    meta = self._checkpoints.meta(number)
    self._position = Position(**meta['position'])
    self._metrics.cut(meta['metrics_lines'])
    pruning = PruneState.from_json(meta['prune'], config)
    params = abstract_params(pruning.plan.pruned_config(config), self._params_dtype())
    state = self._checkpoints.restore(number, jax.eval_shape(self._fresh_state, params))
    print(f'resuming at stage {self._position.stage}, training step {self._position.train_step}', flush=True)
    return state, pruning

  def _params_dtype(self) -> Any:
    return jnp.float32 if self._trains else jnp.dtype(self.source.dtype)

  def _fresh_state(self, params: Any) -> TrainState:
    state = {'params': params}
    return state | {'optimizer': self._optimizer.init(params)} if self._trains else state

  def _resume_pruning(self, stage: int, pruning: PruneState) -> PruneState:
    """The steps of this stage that an earlier process has taken, from plan.json."""
    if not self.workdir.plan.exists():
      return pruning
    saved = json.loads(self.workdir.plan.read_text())
    if saved['stage'] != stage:
      return pruning
    print(f'resuming in the pruning of stage {stage}, after step {saved["step"]}', flush=True)
    self._metrics.cut(saved['metrics_lines'])
    return PruneState.from_json(saved, self.inputs.config)

  def _save(self, pruning: PruneState, state: TrainState, **position: Any) -> None:
    self._position = dataclasses.replace(self._position, **position)
    history = self._position.history | {'seconds': self._seconds(), 'compiles': self._compiles()}
    saved = dataclasses.asdict(dataclasses.replace(self._position, history=history))
    self._checkpoints.save(
      state, {'position': saved, 'prune': pruning.to_json(), 'metrics_lines': self._metrics.lines}
    )

  def _seconds(self) -> float:
    return self._position.history['seconds'] + time.monotonic() - self._started

  def _compiles(self) -> dict[str, int]:
    before = self._position.history['compiles']
    names = ('scoring', 'training', 'evaluation')
    return {n: before.get(n, 0) + self._compiler.counts.get(n, 0) for n in names}

  # -- one stage ------------------------------------------------------------------------------------

  def _prune_stage(self, stage: int, pruning: PruneState, state: TrainState) -> tuple[TrainState, PruneState]:
    start = time.monotonic()
    compacted = pruning.plan
    target = self._targets[stage - 1]

    def on_step(now: PruneState, record: StepRecord) -> None:
      self._metrics.write('prune', stage=stage, **dataclasses.asdict(record))
      lines = {'metrics_lines': self._metrics.lines}
      self._write_plan(stage, now, lines)

    pruning = self._pruner.prune(
      state['params'],
      compacted,
      self._resume_pruning(stage, pruning),
      target,
      on_step,
      f'stage {stage} prune',
    )
    state = self._compact(state, pruning, compacted)
    config = pruning.plan.pruned_config(self.inputs.config)
    if stage > 1 and self._trains and self.options.train.optimizer_state == 'reset':
      state |= {'optimizer': reset_moments(state['optimizer'])}
    perplexity = self._evaluate(config, state, f'stage {stage} pruned')
    self._position.history['open'] = {
      'stage': stage,
      'target': target,
      'params': count_params(config),
      'perplexity_pruned': perplexity,
      'seconds': time.monotonic() - start,
    }
    self._save(pruning, state, stage=stage, complete=False)
    return state, pruning

  def _write_plan(self, stage: int, pruning: PruneState, more: dict[str, Any]) -> None:
    plan = {'stage': stage, 'params': pruning.plan.params(self.inputs.config)} | more
    write_text(self.workdir.plan, json.dumps(plan | pruning.to_json()) + '\n')

  def _compact(self, state: TrainState, pruning: PruneState, compacted: Any) -> TrainState:
    relative = pruning.plan.relative_to(compacted)

    def cut(state: TrainState) -> TrainState:
      return surgery.compact_optimizer(state, state['params'], relative)

    smaller = jax.block_until_ready(jax.jit(cut)(state))
    # Flax checks shapes too, but only while tracing; a wrong plan must not get as far as that.
    wanted = abstract_params(pruning.plan.pruned_config(self.inputs.config))
    chex.assert_trees_all_equal_shapes(smaller['params'], wanted)
    jax.clear_caches()  # programs of the old shapes would stay in memory
    return smaller

  def _recover(self, stage: int, pruning: PruneState, state: TrainState) -> TrainState:
    start_time, start = time.monotonic(), self._position.train_step
    stop, row = self._ends[stage - 1], self._position.history['open']
    config = pruning.plan.pruned_config(self.inputs.config)

    def on_save(step: int, state: TrainState) -> None:
      self._position.history['open'] = row | {'seconds': row['seconds'] + time.monotonic() - start_time}
      self._save(pruning, state, train_step=step)

    if self.inputs.train is not None and stop > start:
      state = run_steps(
        state,
        self._compile_step(config, state),
        self.inputs.train,
        self.options.train,
        seed=self.options.seed,
        start=start,
        stop=stop,
        total=self._ends[-1],
        teacher=self._teacher,
        on_metrics=lambda step, m: self._metrics.write('train', stage=stage, step=step + 1, **m),
        on_save=on_save,
        title=f'stage {stage} recover',
      )
    last = stage == self.options.prune.stages
    if last:
      state |= {'params': self._round_to_export(state['params'])}
    recovered = self._evaluate(config, state, f'stage {stage} recovered') if self._trains else None
    tokens = (stop - (self._ends[stage - 2] if stage > 1 else 0)) * self._tokens_per_step()
    self._position.history['stages'].append(
      row
      | {
        'perplexity_recovered': recovered,
        'tokens': tokens if self._trains else 0,
        'seconds': row['seconds'] + time.monotonic() - start_time,
        'num_heads': [s.num_heads for s in config.layers],
        'num_kv_heads': [s.num_kv_heads for s in config.layers],
        'ffn': [s.ffn for s in config.layers],
      }
    )
    self._position.history['open'] = {}
    self._save(pruning, state, train_step=stop, complete=True)
    return state

  def _tokens_per_step(self) -> int:
    return self.options.train.batch * self.options.train.length

  def _compile_step(self, config: ModelConfig, state: TrainState) -> Any:
    t = self.options.train
    teacher_config = self._teacher.config if self._teacher else None
    step = make_step(config, t, self._optimizer, self._dtype, teacher_config)
    batch = (
      jax.ShapeDtypeStruct((t.batch, t.length), jnp.int32),
      jax.ShapeDtypeStruct((t.batch, t.length), jnp.bool_),
    )
    teachers = (self._teacher.params,) if self._teacher else ()
    return self._compiler('training', step, state, *batch, *teachers, donate_argnums=(0,))

  def _evaluate(self, config: ModelConfig, state: TrainState, title: str) -> float | None:
    if self._evaluator is None:
      return None
    value = self._evaluator.perplexity(config, state['params'], f'{title}: evaluate')
    self._metrics.write('evaluate', of=title, step=self._position.train_step, perplexity=value)
    return value

  # -- the end --------------------------------------------------------------------------------------

  def _export_dtype(self) -> str:
    wanted = self.options.export.dtype
    return self.source.dtype if wanted == 'auto' else wanted

  def _round_to_export(self, params: Any) -> Any:
    """So that the last perplexity is that of the weights as they are saved."""
    dtype = jnp.dtype(self._export_dtype())
    return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)

  def _finish(self, pruning: PruneState, state: TrainState) -> dict[str, Any]:
    config = pruning.plan.pruned_config(self.inputs.config)
    write_hf(
      config,
      state['params'],
      self.workdir.hf,
      tokenizer=self.inputs.tokenizer,
      dtype=jnp.dtype(self._export_dtype()),
      generation=self.source.generation(),
    )
    self._write_plan(self.options.prune.stages, pruning, {'metrics_lines': self._metrics.lines})
    stages = self._position.history['stages']
    report = {
      'model': {
        'source': self.source.name,
        'params_before': count_params(self.inputs.config),
        'params_after': count_params(config),
        'params_target': self._targets[-1],
      },
      'perplexity': {
        'dense': self._position.history['dense'],
        'pruned': stages[-1]['perplexity_pruned'],
        'recovered': stages[-1]['perplexity_recovered'],
        'definition': DEFINITION.format(length=self.options.evaluate.length),
      },
      'stages': stages,
      'compiles': self._compiles(),
      'seconds': self._seconds(),
      'versions': versions(),
    }
    write_text(self.workdir.report, json.dumps(report, indent=2) + '\n')
    return report


def run(options: RunOptions, workdir: Workdir) -> None:
  """Modes accel and prune: runs or resumes, then prints the table."""
  inputs = prepare(options)
  workdir.claim()
  report = Run(options, inputs, workdir).execute()
  print(table(report, str(workdir.hf)))
