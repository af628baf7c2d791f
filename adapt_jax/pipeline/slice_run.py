"""A run of prune.method = slicegpt: slices the dense model, measures it and writes it.

It has no plan, no stages and no training, since no groups are removed: the residual stream becomes narrower.
It takes minutes and saves nothing in between: a run that was killed starts again.
"""

import time
from typing import Any

import jax

from adapt_jax.config.identity import settings
from adapt_jax.config.options import RunOptions
from adapt_jax.export.float16 import check_weights
from adapt_jax.export.writer import Writer, written_dtype
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.preemption import Preempted
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.quality import Quality
from adapt_jax.pipeline.run import Run
from adapt_jax.pipeline.run_report import first, run_report
from adapt_jax.pipeline.schedule import target_cost
from adapt_jax.pipeline.shared import Shared
from adapt_jax.pipeline.state import RunState
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import programs, slicegpt
from adapt_jax.pruning.plan import PruneState
from adapt_jax.reports import run_page
from adapt_jax.reports.report import RunReport, StageReport, versions, write_report


def run_class(options: RunOptions) -> type[Run] | type['SliceRun']:
  """What runs these options."""
  return SliceRun if options.prune.method == slicegpt.METHOD else Run


class SliceRun:
  """One run in its workdir; the arguments are those of `pipeline.run.Run`."""

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
    self._options, self._inputs, self._workdir, self._command = options, inputs, workdir, command
    self._export, self._started = export, time.monotonic()
    self._compiler = Compiler(shared.programs if shared else None)
    self._metrics = MetricsLog(workdir.metrics)
    self._quality = Quality(
      options, inputs, self._metrics, shared or Shared(), compiler=self._compiler, examples=export
    )

  def execute(self) -> RunReport:
    """Slices and measures, writes the exports and report.json; returns the report. Raises `Preempted`."""
    self._metrics.cut(0)
    self._metrics.track(self._options.tracker, settings(self._options))
    with preemption.deferred():
      try:
        return self._run()
      except Preempted:
        raise Preempted('before anything was saved, so the run starts over') from None
      finally:
        self.close()

  def close(self) -> None:
    """Closes the trackers; `execute` does it itself."""
    self._metrics.close()

  def _run(self) -> RunReport:
    options, config = self._options, self._inputs.config
    budget = self._inputs.budget
    target = target_cost(budget, options.prune.target)
    dtype = written_dtype(options.export, self._inputs.source.dtype, trained=False)
    params = self._inputs.model.load_params(None)
    state = RunState({'params': params}, (start := PruneState.start(config)).plan, start)
    state.record_dense(self._quality.perplexity(config, params, 'dense', 0, 0))
    if options.evaluate.has_tasks:
      state.record_tasks('dense', self._quality.tasks(config, params, 'dense', 0))
    began = time.monotonic()
    small = slicegpt.sliced_config(config, slicegpt.width_for(config, target))
    params = slicegpt.slice_model(
      config,
      state.release_params(),
      self._tokens(),
      small.hidden_size,
      dtype=self._inputs.dtype,
      compiler=self._compiler,
    )
    if dtype is not None:  # measured as they will be written
      check_weights(small, params, dtype)
      params = jax.tree.map(lambda x: x.astype(dtype), params)
    perplexity = self._quality.perplexity(small, params, 'pruned', 1, 0)
    if options.evaluate.has_tasks:
      state.record_tasks('pruned', self._quality.tasks(small, params, 'pruned', 0))
    row: StageReport = {
      'stage': 1,
      'target': target,
      'params': count_params(small),
      'hidden_size': small.hidden_size,
      'perplexity_pruned': first(perplexity),
      'perplexity_recovered': None,
      'texts': {name: {'pruned': value} for name, value in perplexity.items()},
      **state.compacted.widths(config),
      'tokens': 0,
      'seconds': time.monotonic() - began,
    }
    state.close_stage(row)
    divergence, examples = self._quality.compare_with_dense(small, params)
    state.record_cost(time.monotonic() - self._started, dict(self._compiler.counts))
    report = run_report(options, self._inputs.model, budget, state, self._quality.definitions)
    report |= {'command': self._command, 'versions': versions()}
    for name, value in divergence.items():
      report['texts'][name]['kl'] = value
    if self._export:
      report['exports'] = self._write(small, params, dtype, report)
    report['examples'] = examples
    events = self._metrics.read()
    run_page.write(self._workdir.page, report, events, command=self._command, running=False)
    write_report(self._workdir.report, report)
    return report

  def _tokens(self) -> jax.Array:
    """Calibration rows [M, B, T]."""
    calibration, blocks = self._options.prune.calibration, self._inputs.calibration
    rows = blocks.tokens[blocks.draw(calibration.samples, self._options.seed, 0)]
    return jax.device_put(rows.reshape(-1, programs.micro_batch(calibration), rows.shape[1]))

  def _write(self, small: ModelConfig, params: Any, dtype: Any, report: RunReport) -> dict[str, Any]:
    writer = Writer(
      self._options.export,
      self._workdir.path,
      tokenizer=self._inputs.tokenizer,
      dtype=dtype,
      generation=self._inputs.source.generation,
      report=report,
    )
    return writer.write(small, params)
