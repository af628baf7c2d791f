"""Mode sensitivity: perplexity when only one decoder layer is pruned, for every layer (paper Fig. 1).

Pruned groups are set to zero, which is the same function as removal, so one program measures every layer of
every base.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from adapt_jax.config.options import RunOptions
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.models.network.llama import Params
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.loader import Loader
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import slicegpt, surgery
from adapt_jax.pruning.plan import PrunePlan, keep_best
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.pruning.scores import Scores
from adapt_jax.pruning.widths import Allocator
from adapt_jax.reports import sensitivity_page
from adapt_jax.reports.report import SensitivityReport, versions, write_report


def narrow(
  config: ModelConfig, plan: PrunePlan, sparsity: float, align_ffn: int, kv: np.ndarray, ffn: np.ndarray
) -> PrunePlan:
  """`plan` with `sparsity` of each layer's remaining groups pruned: the lowest of kv [L, K] and ffn [L, F].

  Rounded as in pruning (`Allocator.widths`): whole KV groups are removed, rounded down.
  """
  allocator = Allocator(plan.pruned_config(config), align_ffn)
  widths = allocator.widths(np.full(config.num_layers, sparsity))
  return keep_best(plan, kv, ffn, widths.kv, widths.ffn)


def without(params: Params, cut: PrunePlan, layer: int) -> Params:
  """The parameters with what `cut` removes from this one layer set to zero."""
  alone = PrunePlan((cut.kv[layer],), (cut.ffn[layer],))
  layers = list(params['layers'])
  (layers[layer],) = surgery.zero({'layers': [layers[layer]]}, alone)['layers']
  return params | {'layers': layers}


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Mode sensitivity: measures or resumes, writes the report in all formats, prints the table."""
  if len(options.evaluate.texts) != 1:
    raise InputError('evaluate.source: mode sensitivity measures perplexity on one text: name one')
  source = open_source(options.model.source)
  if options.prune.method == slicegpt.METHOD or source.config.sliced_from:
    raise InputError('SliceGPT scores no groups: choose another prune.method and a model that is not sliced')
  _check_cuts(options, source.config)
  loader = Loader(options, source, source.load_tokenizer())
  measure = Sensitivity(options, source, loader, workdir, command)
  with workdir.claimed(measure.digests):
    report = measure.execute()
    print(sensitivity_page.text(report))
    print(f'report: {workdir.page}; table: {workdir.path / sensitivity_page.CSV}')


def _check_cuts(options: RunOptions, config: ModelConfig) -> None:
  """Raises InputError if rounding leaves nothing to prune in any layer."""
  o, dense = options.sensitivity, PrunePlan.dense(config)
  scores = [mask.astype(float) for mask in surgery.padded_masks(dense)]  # widths do not depend on them
  for sparsity in o.bases:
    base = narrow(config, dense, sparsity, options.prune.multiples.ffn, *scores)
    if narrow(config, base, o.sparsity, options.prune.multiples.ffn, *scores).equals(base):
      raise InputError(
        f'sensitivity.sparsity = {o.sparsity:g} removes no group of any layer at base {sparsity:g}, with '
        f'{max(base.kv_widths)} KV groups and {max(base.ffn_widths)} channels: raise it'
      )


class Sensitivity:
  """One measurement; metrics.jsonl in its workdir has the results so far: a line per base, then per layer.

  The workdir must be claimed before `execute`. command: that which reproduces the measurement.
  """

  def __init__(self, options: RunOptions, source: Source, loader: Loader, workdir: Workdir, command: str):
    self.options, self.source, self.config = options, source, source.config
    self.workdir, self._command = workdir, command
    self._compiler, self._dtype = Compiler(), compute_dtype(options.model.dtype)
    self._calibration = loader.calibration()
    self._calibration.draw(options.prune.calibration.samples, options.seed, 0)  # raises if rows are too few
    (self._blocks,) = loader.evaluation().values()
    common: dict[str, Any] = {'compiler': self._compiler, 'dtype': self._dtype}
    # Nothing is removed for good, so nothing compensates for it.
    prune = dataclasses.replace(options.prune, compensate='none', attention='kv_groups')
    self._pruner = Pruner(self.config, prune, self._calibration, seed=options.seed, **common)
    self._evaluator = Evaluator(self._blocks, options.evaluate.batch, **common)
    self._metrics = MetricsLog(workdir.metrics)

  def digests(self) -> dict[str, str]:
    """A digest of the model and of each text by option, to notice changes before a resume."""
    return {
      'model.source': self.source.model_digest(),
      'prune.calibration.source': self._calibration.digest(),
      'evaluate.source': self._blocks.digest(),
    }

  def execute(self) -> SensitivityReport:
    """Measures what metrics.jsonl lacks, writes the report in all formats and returns it."""
    self._since = time.monotonic()
    bases, layers = self.options.sensitivity.bases, self.config.num_layers
    done = {base['sparsity']: len(base['layers']) for base in self._report()['bases']}
    todo = [base for base in bases if done.get(base, 0) < layers]
    if done:
      print(f'resuming: {sum(done.values())} of {layers * len(bases)} layers are measured', flush=True)
    if todo:
      left = sum(layers - done.get(base, 0) for base in todo)
      with Progress('sensitivity', left, 'layers') as progress:
        self._measure_all(todo, done, progress)
    report = self._report()
    sensitivity_page.write(self.workdir.path, report, running=False)
    write_report(self.workdir.report, report)
    return report

  def _measure_all(self, bases: list[float], done: dict[float, int], progress: Progress) -> None:
    align, plan = self.options.prune.multiples.ffn, PrunePlan.dense(self.config)
    params = self.source.load_params(self._dtype)
    # The same calibration rows for all bases, so that they differ only by what has been pruned.
    dense_scores = self._score(params, plan)
    for sparsity in bases:
      base = narrow(self.config, plan, sparsity, align, dense_scores.kv, dense_scores.ffn)
      zeroed = surgery.zero(params, base)
      scores = dense_scores if base.equals(plan) else self._score(zeroed, plan)
      cut = narrow(self.config, base, self.options.sensitivity.sparsity, align, scores.kv, scores.ffn)
      if sparsity not in done:
        self._write(
          'base',
          sparsity=sparsity,
          params=base.params(self.config),
          perplexity=self._evaluator.perplexity(self.config, zeroed, f'base {sparsity:g}'),
          layer_importance=np.asarray(scores.distance, np.float64).tolist(),
          kv_groups=base.kv_widths.tolist(),
          ffn=base.ffn_widths.tolist(),
          kv_groups_pruned=cut.kv_widths.tolist(),
          ffn_pruned=cut.ffn_widths.tolist(),
        )
      for layer in range(done.get(sparsity, 0), self.config.num_layers):
        title = f'base {sparsity:g}, layer {layer}'
        perplexity = self._evaluator.perplexity(self.config, without(zeroed, cut, layer), title)
        progress.update(1, base=f'{sparsity:g}', layer=str(layer), perplexity=f'{perplexity:.2f}')
        self._write('layer', base=sparsity, layer=layer, perplexity=perplexity)

  def _score(self, params: Params, dense: PrunePlan) -> Scores:
    return self._pruner.score(self._pruner.stack(params, dense), 0)

  def _write(self, event: str, **values: Any) -> None:
    """Writes one line of the log, with the seconds since the previous one, and the page."""
    now = time.monotonic()
    self._metrics.write(event, **values, seconds=now - self._since)
    self._since = now
    sensitivity_page.write(self.workdir.path, self._report(), running=True)

  def _report(self) -> SensitivityReport:
    """The contents of report.json, as far as metrics.jsonl goes."""
    rows = self._metrics.read()
    bases: list[Any] = []
    for row in (r for r in rows if r['event'] == 'base'):
      mine = [r for r in rows if r['event'] == 'layer' and r['base'] == row['sparsity']]
      kept = {k: v for k, v in row.items() if k not in ('event', 'time', 'seconds')}
      bases.append(kept | {'layers': [r['perplexity'] for r in mine]})
    return {
      'model': {
        'source': self.source.name,
        'params_before': count_params(self.config),
        'num_kv_heads': [s.num_kv_heads for s in self.config.layers],
        'ffn': [s.ffn for s in self.config.layers],
      },
      'sparsity': self.options.sensitivity.sparsity,
      'bases': bases,
      'importance': self._pruner.importance,
      'layer_distance': self._pruner.distance,
      'perplexity': {'definition': self._evaluator.definition},
      'command': self._command,
      'compiles': self._compiler.counts,
      'seconds': sum(r['seconds'] for r in rows),
      'versions': versions(),
    }


def _without_target(options: RunOptions) -> RunOptions:
  """The options with the default of prune.target, which sensitivity.sparsity replaces."""
  return dataclasses.replace(options, prune=dataclasses.replace(options.prune, target=PruneOptions.target))


MODE = Mode(
  'sensitivity',
  'measure perplexity with only one layer pruned, for every layer',
  run,
  result=(
    'seed', 'model', 'data', 'prune.method', 'prune.importance', 'prune.layer_distance', 'prune.align_ffn',
    'prune.serve', 'prune.calibration', 'evaluate.source', 'evaluate.length', 'evaluate.max_tokens',
    'sensitivity',
  ),
  reads=('evaluate.batch',),
  settle=_without_target,
  mesh=False,
)  # fmt: skip
