"""The pruning loop, shared by all methods.

Each step scores all groups and layers on newly drawn calibration rows (on the same ones, if the method works
layer by layer), lets the method of `prune.method` choose what to remove, and sets it to zero. Shapes
never change inside the loop.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.data.windows import Blocks
from adapt_jax.machine import mesh, preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.processes import decide, say
from adapt_jax.machine.progress import Progress, phase
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import sharding
from adapt_jax.models.network.backend import loop_options
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning import algebra, programs, surgery
from adapt_jax.pruning import budget as budgets
from adapt_jax.pruning.attention_units import AttentionUnit, find_unit
from adapt_jax.pruning.budget import Budget
from adapt_jax.pruning.by_layer import CorrectionByLayer, CurvatureByLayer
from adapt_jax.pruning.compensate import add
from adapt_jax.pruning.criteria import find_importance
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.methods.base import Method
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.score_memo import ScoreMemo
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.pruning.scores import Scores

# {'params': …} and, if the model is trained, {'optimizer': …}.
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class StepRecord:
  """The scores and the result of one pruning step.

  `cost` is that of the model in the unit of the budget, which `params` are by default.
  `layer_importance` is I of section 3, larger = more important. `layer_cost` is what a method that ranks the
  groups of all layers together decides by (`Method.layer_cost`); else it is empty. `sparsity` is that of the
  schedule, or the removed share of a layer's prunable parameters. Widths are given for every layer of the
  dense model.
  """

  step: int
  params: int
  cost: float
  loss: float
  layer_importance: list[float]
  layer_cost: list[float]
  sparsity: list[float]
  query_heads: list[int]
  kv_groups: list[int]
  ffn: list[int]


def steps(
  method: Method,
  config: ModelConfig,
  state: PruneState,
  target: int,
  score: Callable[[PruneState], Scores],
) -> Iterator[tuple[Scores, PruneState]]:
  """Runs steps of `method` until the model costs at most `target`; yields each step's scores and new state.

  Args:
    config: the dense model, whose numbering `state.plan` uses.
    target: in the parts of the budget's unit; the method determines how closely it is reached.
    score: returns the scores of the model at a state's plan, on the host.

  Raises InputError if the method stops removing groups above the target, or returns a plan of another unit.
  """
  idle, patience = 0, config.num_layers if method.layer_by_layer else 1
  while (cost := state.plan.cost(method.budget)) > target:
    scores = score(state)
    before, state = state, _agreed(method.step(scores, state, target), config)
    if state.plan.unit is not method.budget.removes:
      raise InputError(
        f'{type(method).__name__} returned a plan of {state.plan.unit.name} instead of '
        f'{method.budget.removes.name}: make it with the unit of state.plan'
      )
    same = state.plan.equals(before.plan) and np.array_equal(state.sparsity, before.sparsity)
    idle = idle + 1 if same else 0
    if idle >= patience:
      stopped, wanted = method.budget.text(cost), method.budget.text(target)
      raise InputError(f'{type(method).__name__} removes nothing more at {stopped}: the target is {wanted}')
    yield scores, state


def _agreed(state: PruneState, config: ModelConfig) -> PruneState:
  """The first process's state, used by all: arithmetic on another host may round differently."""
  if jax.process_count() == 1:
    return state
  return PruneState.from_json(decide(state.to_json), config)


class Pruner:
  """Prunes one model, stage by stage.

  Args:
    config: the model at its original widths, whose numbering the plan uses.
    options: `config.prune`.
    blocks: the calibration rows to draw from.
    seed: seed of the draws; a draw depends only on (seed, step).
    compiler: counts compiles as `scoring` and `compensation`.
    dtype: dtype of weights and activations during scoring.
    memo: cache of scores, shared with pruners of the same weights.
    method: overrides the method in `options`.
    budget: what targets limit, of the model `config`, with the unit of prune.attention; None: the number of
      parameters.

  The attributes `importance` and `distance` are the names of the groups' and layers' scores; `method` decides
  what each step removes.
  """

  def __init__(
    self,
    config: ModelConfig,
    options: PruneOptions,
    blocks: Blocks,
    *,
    seed: int,
    compiler: Compiler,
    dtype: Any,
    memo: ScoreMemo | None = None,
    method: type[Method] | None = None,
    budget: Budget | None = None,
  ):
    self.config, self.options, self.blocks = config, options, blocks
    self._kind = method or METHODS[options.method]
    self._seed, self._compiler, self._dtype = seed, compiler, dtype
    budget = budget or budgets.params(config, find_unit(options, config))
    self._scorer = programs.scoring(config, options, dtype, budget.removes, method)
    _ = self._scorer.shape  # raises InputError for layers that cannot be stacked
    self.method = self._kind(config, options, budget)
    importance, self.distance = self._scorer.importance, self._scorer.distance
    self.importance = importance if isinstance(importance, str) else 'custom'
    self._program: Any = None
    self._compensation: Any = None
    self._memo = memo
    self._zero: Any = None

  @property
  def unit(self) -> AttentionUnit:
    """What is removed from attention."""
    return self._scorer.unit

  def score(self, stacked: Params, step: int, plan: PrunePlan | None = None) -> Scores:
    """Returns `Scores` as NumPy arrays on the rows of `step`; raises InputError if any is not finite.

    `plan`: the groups that `stacked` keeps of the original weights, if the memo may be used.
    """
    rows = self._draw(step)
    if self._memo is None or plan is None:
      scores = self._compute(stacked, rows)
    else:
      scores = self._memo.get(self._key(plan, rows), lambda: self._compute(stacked, rows))
    algebra.check_finite(scores, f'pruning step {step + 1}: the loss is {scores.loss}, and some scores are')
    if self.importance == 'random':
      rng = np.random.default_rng([self._seed, step])
      scores = scores._replace(kv=rng.random(scores.kv.shape), ffn=rng.random(scores.ffn.shape))
    return scores

  def _compute(self, stacked: Params, rows: np.ndarray) -> Scores:
    tokens, scorer = self._tokens(rows), self._scorer
    by_layer = sharding.mesh() is None and find_importance(scorer.importance).curvature
    if self._program is None and by_layer:
      self._program = CurvatureByLayer(scorer, len(tokens), tokens.shape[1], self._compiler)
    elif self._program is None:
      self._program = self._compiler('scoring', scorer, stacked, tokens, xla_options=loop_options())
    with phase('scoring', self._program.total if by_layer else 0) as tick:
      more = (tick,) if by_layer else ()
      scores: Scores = jax.device_get(preemption.ready(self._program(stacked, tokens, *more)))
    return scores

  def _key(self, plan: PrunePlan, rows: np.ndarray) -> tuple[Scorer, bytes]:
    """All that a pass over the original weights depends on; seed and step matter only through the rows."""
    digest = hashlib.sha256()
    for array in (*surgery.padded_masks(plan), self.blocks.tokens[rows]):
      digest.update(repr(array.shape).encode() + array.tobytes())
    return self._scorer, digest.digest()

  def _draw(self, step: int) -> np.ndarray:
    """Indices of the calibration rows of one step, [S]."""
    step = 0 if self._kind.layer_by_layer else step
    return self.blocks.draw(self.options.calibration.samples, self._seed, step)

  def _tokens(self, rows: np.ndarray) -> jax.Array:
    """The tokens of these rows, [S, T]."""
    return mesh.put_rows(rows, lambda ids: (self.blocks.tokens[ids],))[0]

  def stack(self, params: Params, compacted: PrunePlan) -> Params:
    """The input of `prune`, from parameters compacted to `compacted` (see `surgery.stack`)."""
    return mesh.jit(lambda params: surgery.stack(params, compacted, self._dtype), params, once=True)(params)

  def _without(self, stacked: Params, plan: PrunePlan) -> Params:
    """`stacked`, which is donated, with the groups that the plan removes set to zero."""
    masks = surgery.padded_masks(plan)
    if self._zero is None:
      zero = functools.partial(surgery.zero_stacked, unit=self.unit)
      self._zero = mesh.jit(zero, stacked, *masks, donate_argnums=(0,))
    return self._zero(stacked, *masks)

  def _record(self, scores: Scores, before: PrunePlan, state: PruneState) -> StepRecord:
    budget, widths = self.method.budget, state.plan.widths(self.config)
    return StepRecord(
      step=state.step,
      params=state.plan.params(self.config),
      cost=budget.number(state.plan.cost(budget)),
      loss=float(scores.loss),
      layer_importance=np.asarray(scores.distance, np.float64).tolist(),
      layer_cost=self.method.layer_cost(scores, before),
      sparsity=state.sparsity.tolist(),
      query_heads=widths['num_heads'],
      kv_groups=widths['num_kv_heads'],
      ffn=widths['ffn'],
    )

  def prune(
    self,
    stacked: Params,
    compacted: PrunePlan,
    state: PruneState,
    target: int,
    title: str,
  ) -> Iterator[tuple[PruneState, StepRecord]]:
    """Runs steps until the model costs at most `target`; yields each state and its record.

    Args:
      stacked: from `stack`; donated.
      compacted: the plan of `stacked`; `state.plan` may already keep less (after a resume).
      target: in the parts of the budget's unit; the method determines how closely it is reached.
      title: title of the progress bar.
    """
    plan, method, budget = state.plan, self.method, self.method.budget
    # Until the first compaction the weights are the original ones: nothing has trained them.
    own = compacted.equals(PrunePlan.dense(self.config, self.unit))

    def score(state: PruneState) -> Scores:
      nonlocal stacked
      stacked = self._without(stacked, state.plan)
      return self.score(stacked, state.step, state.plan if own else None)

    taken = steps(method, self.config, state, target, score)
    parts = budget.unit.counted_parts
    before = plan.cost(budget) // parts
    with Progress(title, before - target // parts, f'{budget.unit.counted} removed') as progress:
      for scores, state in taken:
        record, plan = self._record(scores, plan, state), state.plan
        left = max(plan.cost(budget), target) // parts
        progress.update(before - left, step=str(record.step), loss=f'{record.loss:.3f}')
        before = left
        yield state, record

  def compensate(self, params: Params, compacted: PrunePlan, plan: PrunePlan, step: int) -> Params:
    """Adjusts `params`, compacted to `compacted`, for what `plan` removes from them, by prune.compensate.

    Uses the rows of `step`. The result still contains the groups that `plan` removes. Raises InputError if
    it is not finite.
    """
    kind = self.options.compensate
    if kind == 'none' or plan.equals(compacted):
      return params
    rows = self._draw(step)
    program = programs.compensation(self.config, self.options, self._dtype, self.unit)

    def compute() -> dict[str, Any]:
      args = self.stack(params, compacted), surgery.padded_masks(plan), self._tokens(rows)
      by_layer = sharding.mesh() is None
      if self._compensation is None and by_layer:
        self._compensation = CorrectionByLayer(program, len(rows), self._compiler)
      elif self._compensation is None:
        self._compensation = self._compiler('compensation', program, *args, xla_options=loop_options())
      say(f'compensating for pruned groups ({kind}) on {args[-1].size:,} tokens')
      with phase('compensating', self._compensation.total if by_layer else 0) as tick:
        more = (tick,) if by_layer else ()
        changes: dict[str, Any] = preemption.ready(self._compensation(*args, *more))
      return changes

    # As for scores: until the first compaction the weights are the original ones.
    if self._memo is None or not compacted.equals(PrunePlan.dense(self.config, self.unit)):
      changes: Any = compute()
    else:
      changes = self._memo.changes((program, self._key(plan, rows)), lambda: jax.device_get(compute()))
    algebra.check_finite(changes, f'prune.compensate = {kind!r} gives weights that are')
    added = mesh.jit(lambda tree, more: add(tree, compacted, more), params, changes, once=True)
    return added(params, changes)


def prune_model(
  pruner: Pruner,
  load: Callable[[], Arrays],
  state: PruneState,
  target: int,
  *,
  compacted: PrunePlan | None = None,
  after_step: Callable[[PruneState, StepRecord], None] = lambda state, record: None,
  title: str = 'prune',
) -> tuple[Arrays, PruneState]:
  """Prunes a model to a target, adjusts the remaining weights and compacts the arrays.

  Args:
    load: returns {'params'}, and {'optimizer'} if there are moments to compact too. It is called before the
      first step and after the last, so that scoring holds only one copy; the parameters are then taken out.
    state: where to start; its plan may keep less than `compacted`, after a resume.
    target: in the parts of the budget's unit.
    compacted: the plan of the arrays; by default that of `state`.
    after_step: is called with each step's state and record.

  Returns the arrays at the widths of the new state, and this state. A repetition gives the same bits.
  """
  compacted = compacted or state.plan
  if state.plan.cost(pruner.method.budget) > target:
    stacked = pruner.stack(load()['params'], compacted)
    taken = pruner.prune(stacked, compacted, state, target, title)
    del stacked  # donated
    for state, record in taken:
      after_step(state, record)
  arrays = load()
  arrays['params'] = pruner.compensate(arrays.pop('params'), compacted, state.plan, state.step - 1)
  relative = state.plan.relative_to(compacted)
  with phase('compacting'):
    cut = mesh.jit(lambda x: surgery.compact_optimizer(x, x['params'], relative), arrays, once=True)
    return jax.block_until_ready(cut(arrays)), state
