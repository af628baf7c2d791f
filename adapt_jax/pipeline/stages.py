"""The two halves of a stage of Adapt-Accel: pruning and recovery (paper section 4).

Each updates a `RunState` and yields after each step; `pipeline/run.py` measures, logs and saves in between.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from adapt_jax.config.options import RunOptions
from adapt_jax.data.train_set import TrainSet
from adapt_jax.machine import mesh
from adapt_jax.machine.compiler import Compiler, forget_traces
from adapt_jax.machine.mesh import load_source
from adapt_jax.machine.progress import phase
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pipeline.state import RunState, array_shapes
from adapt_jax.pruning import surgery
from adapt_jax.pruning.narrow import narrow
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.programs import micro_batch
from adapt_jax.pruning.pruner import Pruner, StepRecord
from adapt_jax.pruning.score_memo import ScoreMemo
from adapt_jax.training.loop import Diverged, Trained, run_steps
from adapt_jax.training.optim import reset_moments
from adapt_jax.training.step import Teacher, TrainingStep, TrainState, batch_shapes
from adapt_jax.training.teacher_cache import TaughtSet, open_taught


class Pruning:
  """Prunes the model of a stage, adjusts the remaining weights and compacts the arrays.

  Args:
    options, inputs, schedule: those of the run.
    optimizer: the optimizer of training; None if the run only prunes.
    compiler: counts compiles as `narrowing`, `scoring` and `compensation`.
    memo: cache of scores, shared with other runs on the same model.
  """

  def __init__(
    self,
    options: RunOptions,
    inputs: Inputs,
    schedule: Schedule,
    optimizer: optax.GradientTransformation | None,
    *,
    compiler: Compiler,
    memo: ScoreMemo | None,
  ):
    self._options, self._inputs, self._schedule, self._optimizer = options, inputs, schedule, optimizer
    self._compiler = compiler
    self._pruner = Pruner(
      inputs.config,
      options.prune,
      inputs.calibration,
      seed=options.seed,
      compiler=compiler,
      dtype=inputs.dtype,
      # Its keys do not tell narrowed weights apart.
      memo=None if options.prune.hidden else memo,
      budget=inputs.budget,
    )

  def start(self) -> TrainState:
    """The dense parameters, narrowed by prune.hidden; fp32 if they are trained.

    Moments are created for the first, smaller model.
    """
    dtype = jnp.float32 if self._optimizer else None  # None: each tensor's own
    model = self._inputs.model
    if not model.hidden:
      return {'params': model.load_params(dtype)}
    narrowed = narrow(
      model.whole,
      model.load_params(dtype),  # not held here, so that it can be freed
      self._pruner.tokens(0),
      model.hidden,
      micro_batch=micro_batch(self._options.prune.calibration),
      dtype=self._inputs.dtype,
      compiler=self._compiler,
    )
    return {'params': narrowed}

  def shapes(self, plan: PrunePlan) -> Any:
    """Shapes, dtypes and shardings of the run's arrays at the plan's widths."""
    return array_shapes(self._inputs.model, plan, self._optimizer)

  def steps(self, stage: int, state: RunState) -> Iterator[StepRecord]:
    """Prunes to the stage's target; yields each step after recording it in the state."""
    target = self._schedule.target(stage)
    if state.pruning.plan.cost(self._inputs.budget) <= target:
      return
    stacked = self._pruner.stack(state.params, state.compacted)
    # Not trained yet: read again below, so that scoring holds only one copy. Narrowed weights are kept: to
    # narrow again would take longer.
    again = stage == 1 and not self._inputs.model.hidden
    if again:
      state.release_params()
    title = f'stage {stage} prune'
    taken = self._pruner.prune(stacked, state.compacted, state.pruning, target, title)
    del stacked
    for pruning, record in taken:
      state.take_step(pruning)
      yield record
    if again:
      state.hold(self.start())

  def finish(self, stage: int, state: RunState) -> None:
    """Adjusts the remaining weights for what was removed, and compacts the arrays.

    Uses the rows of the last step. It is repeated, with the same bits, if killed before the stage is saved.
    """
    step = state.pruning.step - 1
    params = self._pruner.compensate(state.release_params(), state.compacted, state.pruning.plan, step)
    state.hold(state.arrays | {'params': params})
    del params
    self._compact(state)
    if stage > 1 and self._optimizer and self._options.train.optimizer_state == 'reset':
      state.hold(state.arrays | {'optimizer': reset_moments(state.arrays['optimizer'])})

  def _compact(self, state: RunState) -> None:
    with phase('compacting'):
      self._compact_arrays(state)

  def _compact_arrays(self, state: RunState) -> None:
    relative = state.pruning.plan.relative_to(state.compacted)

    def cut(arrays: TrainState) -> TrainState:
      return surgery.compact_optimizer(arrays, arrays['params'], relative)

    state.compacted_to_plan(jax.block_until_ready(mesh.jit(cut, state.arrays, once=True)(state.arrays)))
    if 'optimizer' not in state.arrays and self._optimizer:
      moments = mesh.jit(self._optimizer.init, state.params, once=True)(state.params)
      state.hold(state.arrays | {'optimizer': moments})
    # Flax also checks shapes, but only while tracing; a wrong plan must be found before that.
    chex.assert_trees_all_equal_shapes(state.arrays, self.shapes(state.compacted))
    forget_traces()  # programs of the old shapes would stay in memory

  def next_schedule(self, state: RunState) -> PruneState:
    """The schedule's state at the start of the next stage."""
    return self._pruner.next_stage(state.pruning)


class Recovery:
  """Trains the model of a stage on its share of the data.

  Args:
    options, inputs, schedule: those of the run.
    optimizer: the optimizer; its state is kept from stage to stage.
    compiler: counts compiles as `training`, one per stage, and as `teacher`.
  """

  def __init__(
    self,
    options: RunOptions,
    inputs: Inputs,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    *,
    compiler: Compiler,
  ):
    self._options, self._inputs, self._schedule = options, inputs, schedule
    self._optimizer, self._compiler = optimizer, compiler
    self._data: TrainSet | TaughtSet | None = inputs.train
    self._teacher: Teacher | None = None

  def prepare(self, directory: pathlib.Path) -> None:
    """Loads the teacher, if there is one; with distill.cache, writes its predictions to `directory` instead.

    Nothing else needs to be on the devices yet. Raises `Preempted` after SIGTERM.
    """
    distill, inputs = self._options.train.distill, self._inputs
    if not distill.alpha:
      return

    def load_teacher() -> Teacher:
      return Teacher(inputs.source.config, load_source(inputs.source, inputs.dtype))

    if distill.teacher_beside:
      self._teacher = load_teacher()
    elif inputs.train is not None:
      self._data = open_taught(
        directory,
        inputs.train,
        self._options.train,
        self._schedule.train_steps,
        load_teacher,
        dtype=inputs.dtype,
        compiler=self._compiler,
      )

  def steps(self, stage: int, state: RunState) -> Iterator[Trained]:
    """Trains to the end of the stage; yields each step, and updates the arrays if the step includes them."""
    train, stop = self._data, self._schedule.end(stage)
    if train is None or state.train_step >= stop:
      return
    taken = run_steps(
      state.arrays,
      self._compile(state),
      train,
      self._options.train,
      start=state.train_step,
      stop=stop,
      total=self._schedule.train_steps,
      teacher=self._teacher,
      title=f'stage {stage} recover',
    )
    try:
      for done in taken:
        if done.state is not None:
          state.trained_to(done.step, done.state)
        yield done
    except Diverged as error:
      raise Diverged(f'{error} and start a new workdir; the last checkpoint is good') from None

  def _compile(self, state: RunState) -> Any:
    options, teacher = self._options.train, self._teacher
    config = state.compacted.pruned_config(self._inputs.config)
    step = TrainingStep(
      config, options, self._optimizer, self._inputs.dtype, teacher.config if teacher else None
    )
    args = (state.arrays, batch_shapes(options), *((teacher.params,) if teacher else ()))
    program = self._compiler('training', step, *args, donate_argnums=(0,))
    forget_traces()
    return program
