"""The two halves of a stage of Adapt-Accel: pruning, which ends with healing, and recovery (paper section 4).

Each updates a `RunState` and yields after each step; `pipeline/run.py` measures, logs and saves in between.
"""

import pathlib
from collections.abc import Callable, Iterator
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
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pipeline.shared import Shared
from adapt_jax.pipeline.state import RunState, array_shapes
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner, StepRecord, prune_model
from adapt_jax.training.healing import Healing
from adapt_jax.training.loop import Diverged, Trained, recover_model
from adapt_jax.training.step import Teacher, TrainState
from adapt_jax.training.teacher_cache import TaughtSet, open_taught


def trained(options: RunOptions) -> bool:
  """Whether a run changes weights by training or healing, and so needs them in fp32."""
  return options.train.tokens > 0 or options.prune.heal > 0


class Pruning:
  """Prunes the model of a stage, adjusts the remaining weights, compacts the arrays and, at last, heals them.

  Without calibration rows it only prepares the arrays for training.

  Args:
    options, inputs, schedule: those of the run.
    optimizer: the optimizer of training; None if the run only prunes.
    compiler: counts compiles as `scoring` and `compensation`, of healing as `teacher` and `healing`.
    shared: caches shared with other runs on the same model.
  """

  def __init__(
    self,
    options: RunOptions,
    inputs: Inputs,
    schedule: Schedule,
    optimizer: optax.GradientTransformation | None,
    *,
    compiler: Compiler,
    shared: Shared | None,
  ):
    self._options, self._inputs, self._schedule = options, inputs, schedule
    self._optimizer, self._compiler = optimizer, compiler
    self._healing: Healing | None = None
    self._told = shared.told if shared else {}
    common: dict[str, Any] = {'seed': options.seed, 'compiler': compiler, 'dtype': inputs.dtype}
    rows, common = inputs.calibration, common | {'budget': inputs.budget}
    common['memo'] = shared.scores if shared else None
    self._pruner = Pruner(inputs.config, options.prune, rows, **common) if rows is not None else None

  def start(self) -> TrainState:
    """The dense parameters, fp32 if they are trained. Moments are created for the first, smaller model."""
    dtype = jnp.float32 if trained(self._options) else None  # None: each tensor's own
    return {'params': self._inputs.model.load_params(dtype)}

  def prepare(self, state: RunState) -> None:
    """Asks the dense model for what it says on the calibration rows, if the run is still to be healed.

    Raises `Preempted` after SIGTERM.
    """
    prune, inputs, blocks = self._options.prune, self._inputs, self._inputs.calibration
    if not prune.heal or blocks is None or state.stage == self._schedule.stages:
      return
    dtype = compute_dtype(self._options.training_dtype)
    params = inputs.model.load_params(dtype) if state.stage else state.params
    seed, calibration = self._options.seed, prune.calibration
    self._healing = Healing(
      blocks.tokens[blocks.draw(calibration.samples, seed, 0)],
      prune.heal,
      Teacher(inputs.config, jax.tree.map(lambda x: x.astype(dtype), params)),
      inputs.source.stored_params(),
      micro_batch=calibration.batch,
      seed=seed,
      dtype=dtype,
      compiler=self._compiler,
      known=self._told,
      moments_dtype=self._options.train.moments_dtype,
    )

  def shapes(self, plan: PrunePlan) -> Any:
    """Shapes, dtypes and shardings of the run's arrays at the plan's widths."""
    return array_shapes(self._inputs.model, plan, self._optimizer, trained(self._options))

  def prune(
    self,
    stage: int,
    state: RunState,
    after_step: Callable[[StepRecord], None],
    after_healing: Callable[[Trained], None],
  ) -> None:
    """Prunes to the stage's target; calls `after_step` for each step after recording it in the state.

    The last stage ends with healing; `after_healing` is called for each of its steps. Then the arrays have
    the new widths. Killed before the stage is saved, all of it is repeated with the same bits, except for the
    steps that were recorded.
    """

    def load() -> TrainState:
      if not state.arrays:
        state.hold(self.start())
      arrays = state.arrays
      if stage == 1:  # not trained yet: read again after scoring
        state.hold({})
      return arrays

    def record_step(pruning: PruneState, record: StepRecord) -> None:
      state.pruning = pruning  # the arrays do not change until the stage is compacted
      after_step(record)

    if self._pruner is not None:
      arrays, _ = prune_model(
        self._pruner,
        load,
        state.pruning,
        self._schedule.target(stage),
        compacted=state.compacted,
        after_step=record_step,
        title=f'stage {stage} prune',
      )
      state.compacted_to_plan(arrays)
      del arrays
    if self._healing and stage == self._schedule.stages:
      self._heal(state, after_healing)
    if 'optimizer' not in state.arrays and self._optimizer:
      moments = mesh.jit(self._optimizer.init, state.params, once=True)(state.params)
      state.hold(state.arrays | {'optimizer': moments})
    # Flax also checks shapes, but only while tracing; a wrong plan must be found before that.
    chex.assert_trees_all_equal_shapes(state.arrays, self.shapes(state.compacted))
    forget_traces()  # programs of the old shapes would stay in memory

  def _heal(self, state: RunState, after_step: Callable[[Trained], None]) -> None:
    assert self._healing is not None
    if not state.compacted.equals(PrunePlan.dense(self._inputs.config, state.compacted.unit)):
      config, arrays = state.compacted.pruned_config(self._inputs.config), {**state.arrays}
      state.hold({})  # healing copies the parameters
      self._healing.heal(config, arrays, 'heal', after_step)
      state.hold(arrays)
    self._healing = None  # its rows


class Recovery:
  """Trains the model of a stage on its share of the data.

  Args:
    options, inputs, schedule: those of the run.
    optimizer: the optimizer; its state is kept from stage to stage.
    compiler: counts compiles as `training`, one per stage (more, if that does not fit), and as `teacher`.
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
    self._dtype = compute_dtype(options.training_dtype)
    self._optimizer, self._compiler = optimizer, compiler
    self._data: TrainSet | TaughtSet | None = inputs.train
    self._teacher: Teacher | None = None

  def prepare(self, directory: pathlib.Path) -> None:
    """Loads the teacher, if there is one; with distill.cache, writes its predictions to `directory` instead.

    Nothing else needs to be on the devices yet. Raises `Preempted` after SIGTERM.
    """
    distill, inputs = self._options.train.distill, self._inputs
    if (source := inputs.teacher) is None:
      return

    def load_teacher() -> Teacher:
      return Teacher(source.config, load_source(source, self._dtype))

    if distill.teacher_beside:
      self._teacher = load_teacher()
    elif inputs.train is not None:
      self._data = open_taught(
        directory,
        inputs.train,
        self._options.train,
        self._schedule.train_steps,
        load_teacher,
        dtype=self._dtype,
        compiler=self._compiler,
      )

  def steps(self, stage: int, state: RunState) -> Iterator[Trained]:
    """Trains to the end of the stage; yields each step, and updates the arrays if the step includes them."""
    train, stop = self._data, self._schedule.end(stage)
    if train is None or state.train_step >= stop:
      return
    taken = recover_model(
      state.compacted.pruned_config(self._inputs.config),
      state.arrays,
      train,
      self._options.train,
      self._optimizer,
      start=state.train_step,
      stop=stop,
      total=self._schedule.train_steps,
      teacher=self._teacher,
      dtype=self._dtype,
      compiler=self._compiler,
      title=f'stage {stage} recover',
      beside=0,  # nothing else is on the devices; measured, a resumed run might choose another step
    )
    forget_traces()
    try:
      for done in taken:
        if done.state is not None:
          state.trained_to(done.step, done.state)
        yield done
    except Diverged as error:
      raise Diverged(f'{error} and start a new workdir; the last checkpoint is good') from None
