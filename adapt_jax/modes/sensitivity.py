"""Mode sensitivity: perplexity when only one decoder layer is pruned, for every layer (paper Fig. 1).

Pruned groups are set to zero, which is the same function as removal, so one program, with layer and masks as
arguments, measures every layer of every base. The output of the layers before the pruned one is reused, so
each of a base's L passes computes on average (L + 1)/2 of the L layers, and the head.
"""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.options import ExportOptions, RunOptions
from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation.perplexity import batch_size, batches, definition
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import loop_options
from adapt_jax.models.network.llama import Params
from adapt_jax.modes import sensitivity_page
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.inputs import Inputs, prepare
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import slicegpt, surgery
from adapt_jax.pruning.plan import PrunePlan, keep_best
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.pruning.widths import Allocator
from adapt_jax.reports.report import SensitivityReport, versions, write_report
from adapt_jax.training.loss import next_token_loss


def narrow(
  config: ModelConfig, plan: PrunePlan, sparsity: float, align_ffn: int, kv: np.ndarray, ffn: np.ndarray
) -> PrunePlan:
  """`plan` with `sparsity` of each layer's remaining groups pruned: the lowest of kv [L, K] and ffn [L, F].

  Rounded as in pruning (`Allocator.widths`): whole KV groups are removed, rounded down.
  """
  allocator = Allocator(plan.pruned_config(config), align_ffn)
  widths = allocator.widths(np.full(config.num_layers, sparsity))
  return keep_best(plan, kv, ffn, widths.kv, widths.ffn)


def cut_masks(cut: PrunePlan, layer: int, block: str) -> tuple[np.ndarray, np.ndarray]:
  """Masks [K] and [F], padded to the widest layer, of the groups that `layer` keeps if `block` is pruned."""
  kv, ffn = (masks[layer] for masks in surgery.padded_masks(cut))
  return (np.ones_like(kv) if block == 'mlp' else kv), (np.ones_like(ffn) if block == 'attention' else ffn)


class LayerEvaluator:
  """Perplexity of stacked parameters with one layer pruned; one program for all layers and models.

  It has a current layer and holds that layer's inputs on all windows: N · T · D activations.

  Args:
    config: the model at its original widths.
    blocks: the windows [N, T] and a mask of the tokens that count.
    batch: windows at once.
    compiler: counts the one compile as `evaluation`.
    dtype: of weights and activations.
  """

  def __init__(self, config: ModelConfig, blocks: Blocks, batch: int, *, compiler: Compiler, dtype: Any):
    self._config, self._shape, self._dtype = config, Scorer(config).shape, dtype
    self._compiler = compiler
    self._program: Any = None
    self._targets = int(blocks.targets.sum())
    self._batches = [batch[:2] for batch in batches(blocks, batch_size(blocks, batch))]
    self._everything = np.ones(self._shape.num_kv_heads, bool), np.ones(self._shape.ffn, bool)

  def start(self, stacked: Params, layer: int = 0) -> None:
    """Moves to `layer` of the model `stacked`, from `surgery.stack`."""
    shape = (*self._batches[0][0].shape, self._config.hidden_size)
    self._stacked, self._layer = stacked, 0
    self._inputs = [jnp.zeros(shape, self._dtype)] * len(self._batches)
    if layer:
      self._move(layer)

  def advance(self) -> None:
    """Moves to the next layer."""
    self._move(self._layer + 1)

  def perplexity(self, masks: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """Perplexity with the current layer pruned to `masks` of its KV groups [K] and channels [F]."""
    total = self._run(self._config.num_layers, masks or self._everything)[1]
    if not math.isfinite(total):
      where = 'base model' if masks is None else f'layer {self._layer} pruned'
      raise InputError(f'{where}: the loss is {total}: check the weights and model.dtype')
    return math.exp(min(total / self._targets, 700))

  def _move(self, layer: int) -> None:
    self._inputs, self._layer = self._run(layer, self._everything)[0], layer

  def _run(self, stop: int, masks: tuple[np.ndarray, np.ndarray]) -> tuple[list[jax.Array], float]:
    outputs, losses = [], []
    for x_BTD, batch in zip(self._inputs, self._batches, strict=True):
      preemption.check()
      args = (self._stacked, x_BTD, *batch, np.int32(self._layer), np.int32(stop), *masks)
      if self._program is None:
        self._program = self._compiler('evaluation', self._segment, *args, xla_options=loop_options())
      x_BTD, loss = self._program(*args)
      outputs.append(x_BTD)
      losses.append(loss)
    return outputs, float(np.sum(jax.device_get(losses), dtype=np.float64))

  def _segment(
    self,
    stacked: Params,
    x_BTD: jax.Array,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    kv_K: jax.Array,
    ffn_F: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Applies layers start … stop-1, the first one masked; also the summed loss, 0 before the last layer."""
    config, layers, tables = self._config, stacked['layers'], llama.rope(self._config, tokens_BT.shape[1])

    def apply(i: jax.Array, layer: Params, x_BTD: jax.Array) -> jax.Array:
      return llama.apply_layer(config, self._shape, layer, x_BTD, tables.of(i))

    def base(i: jax.Array, x_BTD: jax.Array) -> jax.Array:
      layer = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), layers)
      return apply(i, layer, x_BTD)

    def loss() -> jax.Array:
      normed_BTD = llama.final_norm(config, stacked, x_BTD)
      return next_token_loss(normed_BTD, llama.head(stacked), tokens_BT, targets_BT, config.logit_cap)

    x_BTD = jnp.where(start == 0, llama.embed(config, stacked, tokens_BT, x_BTD.dtype), x_BTD)
    first = {'layers': jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, start, 1), layers)}
    first = surgery.zero_stacked(first, kv_K[None], ffn_F[None])
    x_BTD = apply(start, jax.tree.map(lambda w: w[0], first['layers']), x_BTD)
    x_BTD = jax.lax.fori_loop(start + 1, stop, base, x_BTD)
    return x_BTD, jax.lax.cond(stop == config.num_layers, loss, lambda: jnp.zeros(()))


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Mode sensitivity: measures or resumes, writes the report in all formats, prints the table."""
  if options.prune.method == slicegpt.METHOD:
    raise InputError(f'prune.method = {slicegpt.METHOD!r} scores no groups: choose another method')
  if not options.evaluate.source:
    raise InputError('evaluate.source is empty, but mode sensitivity measures perplexity: name a text')
  if len(names := list(options.evaluate.texts)) > 1:
    raise InputError(
      f'evaluate.source names the texts {", ".join(names)}, but mode sensitivity measures one: '
      f'leave the others out'
    )
  # Nothing is removed permanently, so nothing compensates for it; `bias` would count in the sizes. A recipe's
  # target, stages, budget, training and exports are for other modes. Attention is
  # pruned by KV groups.
  prune = dataclasses.replace(
    options.prune,
    compensate='none',
    target=1.0,
    stages=1,
    budget='params',
    attention='kv_groups',
  )
  train = dataclasses.replace(options.train, tokens=0)
  options = dataclasses.replace(options, prune=prune, train=train, export=ExportOptions())
  inputs = prepare(options)
  _check_cuts(options, inputs.config)
  measure = Sensitivity(options, inputs, workdir, command)
  with workdir.claimed(inputs.digests):
    report = measure.execute()
    print(sensitivity_page.table(report))
    print(f'report: {workdir.page}; table: {workdir.path / sensitivity_page.CSV}')


def _check_cuts(options: RunOptions, config: ModelConfig) -> None:
  """Raises InputError if rounding leaves nothing to prune of some block in any layer."""
  o, dense, align = options.sensitivity, PrunePlan.dense(config), options.prune.multiples.ffn
  scores = [mask.astype(float) for mask in surgery.padded_masks(dense)]  # widths do not depend on them
  for sparsity in o.bases:
    base = narrow(config, dense, sparsity, align, *scores)
    cut = narrow(config, base, o.sparsity, align, *scores)
    removed = {
      'attention': int(np.sum(base.kv_widths - cut.kv_widths)),
      'mlp': int(np.sum(base.ffn_widths - cut.ffn_widths)),
    }
    for block in o.blocks:
      if not removed.get(block, sum(removed.values())):
        raise InputError(
          f'sensitivity.sparsity = {o.sparsity:g} removes no group of any layer (blocks: {block}) at '
          f'base {sparsity:g}, with {max(base.kv_widths)} KV groups and {max(base.ffn_widths)} channels: '
          f'raise it, or leave that block or base out'
        )


class Sensitivity:
  """One measurement in its workdir; metrics.jsonl has the results so far: a line per base, then per layer.

  Args:
    options: checked options.
    inputs: model, calibration and evaluation blocks, opened and checked.
    workdir: must be claimed before `execute`.
    command: the command that reproduces the run, for its report.
  """

  def __init__(self, options: RunOptions, inputs: Inputs, workdir: Workdir, command: str):
    self.options, self.inputs, self.workdir, self._command = options, inputs, workdir, command
    self._compiler = Compiler()
    common: dict[str, Any] = {'compiler': self._compiler, 'dtype': inputs.dtype}
    self._pruner = Pruner(inputs.config, options.prune, inputs.calibration, seed=options.seed, **common)
    (self._blocks,) = inputs.evaluate.values()
    self._evaluator = LayerEvaluator(inputs.config, self._blocks, options.evaluate.batch, **common)
    self._metrics = MetricsLog(workdir.metrics)
    self._zero = jax.jit(lambda layers, kv, ffn: surgery.zero_stacked({'layers': layers}, kv, ffn)['layers'])

  def execute(self) -> SensitivityReport:
    """Measures what metrics.jsonl lacks, writes the report in all formats and returns it."""
    self._since = time.monotonic()
    bases, layers = self.options.sensitivity.bases, self.inputs.config.num_layers
    done = {base['sparsity']: len(base['layers']) for base in self._report()['bases']}
    todo = [base for base in bases if done.get(base, 0) < layers]
    if done:
      print(f'resuming: {sum(done.values())} of {layers * len(bases)} layers are measured', flush=True)
    if todo:
      evaluations = sum(layers - done.get(base, 0) for base in todo) * len(self.options.sensitivity.blocks)
      with Progress('sensitivity', evaluations, 'evaluations') as progress:
        self._measure_all(todo, done, progress)
    report = self._report()
    sensitivity_page.write(self.workdir, report, running=False)
    write_report(self.workdir.report, report)
    return report

  def _measure_all(self, bases: list[float], done: dict[float, int], progress: Progress) -> None:
    config, align = self.inputs.config, self.options.prune.multiples.ffn
    plan = PrunePlan.dense(config)
    params = self.inputs.source.load_params(self.inputs.dtype)
    dense = self._pruner.stack(params, plan)
    del params
    # The same calibration rows for all bases, so that they differ only by what has been pruned.
    dense_scores = self._pruner.score(dense, 0)
    for sparsity in bases:
      base = narrow(config, plan, sparsity, align, dense_scores.kv, dense_scores.ffn)
      stacked, scores = dense, dense_scores
      if not base.equals(plan):
        stacked = dense | {'layers': self._zero(dense['layers'], *surgery.padded_masks(base))}
        scores = self._pruner.score(stacked, 0)
      cut = narrow(config, base, self.options.sensitivity.sparsity, align, scores.kv, scores.ffn)
      if sparsity not in done:
        self._measure_base(sparsity, stacked, base, cut, scores)
      self._measure_layers(sparsity, stacked, cut, done.get(sparsity, 0), progress)

  def _measure_base(
    self, sparsity: float, stacked: Params, base: PrunePlan, cut: PrunePlan, scores: Any
  ) -> None:
    self._evaluator.start(stacked)
    self._write(
      'base',
      sparsity=sparsity,
      params=base.params(self.inputs.config),
      perplexity=self._evaluator.perplexity(),
      calibration_loss=float(scores.loss),
      layer_importance=np.asarray(scores.distance, np.float64).tolist(),
      kv_groups=base.kv_widths.tolist(),
      ffn=base.ffn_widths.tolist(),
      kv_groups_pruned=cut.kv_widths.tolist(),
      ffn_pruned=cut.ffn_widths.tolist(),
    )

  def _measure_layers(
    self, sparsity: float, stacked: Params, cut: PrunePlan, first: int, progress: Progress
  ) -> None:
    layers = self.inputs.config.num_layers
    self._evaluator.start(stacked, first)
    for layer in range(first, layers):
      found = {}
      for block in self.options.sensitivity.blocks:
        found[block] = self._evaluator.perplexity(cut_masks(cut, layer, block))
        progress.update(1, base=f'{sparsity:g}', layer=str(layer), perplexity=f'{found[block]:.2f}')
      self._write('layer', base=sparsity, layer=layer, perplexity=found)
      if layer + 1 < layers:
        self._evaluator.advance()

  def _write(self, event: str, **values: Any) -> None:
    """Writes one line of the log, with the seconds since the previous one, and rewrites the page."""
    now = time.monotonic()
    self._metrics.write(event, **values, seconds=now - self._since)
    self._since = now
    sensitivity_page.write(self.workdir, self._report(), running=True)

  def _report(self) -> SensitivityReport:
    """The contents of report.json, as far as metrics.jsonl goes."""
    config, rows = self.inputs.config, self._metrics.read()
    bases: list[Any] = []
    for row in (r for r in rows if r['event'] == 'base'):
      mine = [r for r in rows if r['event'] == 'layer' and r['base'] == row['sparsity']]
      kept = {k: v for k, v in row.items() if k not in ('event', 'time', 'seconds')}
      bases.append(kept | {'layers': [r['perplexity'] for r in mine]})
    return {
      'model': {
        'source': self.inputs.source.name,
        'params_before': count_params(config),
        'num_kv_heads': [s.num_kv_heads for s in config.layers],
        'ffn': [s.ffn for s in config.layers],
      },
      'sparsity': self.options.sensitivity.sparsity,
      'blocks': list(self.options.sensitivity.blocks),
      'bases': bases,
      'importance': self._pruner.importance,
      'layer_distance': self._pruner.distance,
      'perplexity': {'definition': definition(self._blocks)},
      'command': self._command,
      'compiles': self._compiler.counts,
      'seconds': sum(r['seconds'] for r in rows),
      'versions': versions(),
    }


MODE = Mode(
  'sensitivity',
  'measure perplexity with only one layer pruned, for every layer',
  run,
  result=(
    'seed', 'model', 'data', 'prune.method', 'prune.importance', 'prune.layer_distance', 'prune.align_ffn',
    'prune.calibration', 'evaluate.source', 'evaluate.length', 'evaluate.max_tokens',
    'sensitivity',
  ),
  reads=('evaluate.batch', 'prune.serve'),
  mesh=False,
)  # fmt: skip
