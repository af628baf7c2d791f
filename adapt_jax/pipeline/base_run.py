"""What every run has that prunes or recovers: inputs, log, measurements and report, and how it ends."""

import time
from typing import Any

import jax

from adapt_jax.config.options import RunOptions
from adapt_jax.export.float16 import check_weights
from adapt_jax.export.writer import Writer, written_dtype
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.processes import is_first
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.gain import measured_gain
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pipeline.measured import measured_file, measured_latency
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.quality import Quality
from adapt_jax.pipeline.run_report import described_source, run_report
from adapt_jax.pipeline.shared import Shared
from adapt_jax.pipeline.stages import trained
from adapt_jax.pipeline.state import RunState
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import run_page
from adapt_jax.reports.report import Of, RunReport, versions, write_report


class BaseRun:
  """A run in its workdir.

  Args:
    options: checked options.
    inputs: model, tokenizer and token blocks, opened and checked.
    workdir: a claimed workdir.
    command: the command that reproduces the run, for its report.
    shared: caches shared with other runs of this process on the same model.
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
    self.options, self._inputs, self._workdir, self._command = options, inputs, workdir, command
    self._export, self._started = export, time.monotonic()
    self._trains = inputs.train is not None
    self._compiler = Compiler(shared.programs if shared else None)
    self._metrics = MetricsLog(workdir.metrics)
    self._quality = Quality(options, inputs, self._metrics, shared or Shared(), compiler=self._compiler)
    self._prepare(shared)

  def _prepare(self, shared: Shared | None) -> None:
    """Completes the construction of a kind of run."""

  def _measure_tasks(self, state: RunState, config: ModelConfig, params: Params, of: Of) -> bool:
    """Records the model's scores on tasks in the state; False if already done, or if there are no tasks."""
    if not self.options.evaluate.has_tasks or of in state.tasks:
      return False
    state.record_tasks(of, self._quality.tasks(config, params, of, state.train_step))
    return True

  def _rounded(self, config: ModelConfig, params: Params) -> Params:
    """The weights as the export rounds them, in their own dtype, so that they are measured as written."""
    if (dtype := self._export_dtype()) is None:
      return params
    check_weights(config, params, dtype)
    rounded: Params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
    return rounded

  def _export_dtype(self) -> Any:
    return written_dtype(self.options.export, self._inputs.source, trained(self.options))

  def _record_cost(self, state: RunState) -> None:
    """Records the time and the compiles of the whole run so far."""
    state.seconds, state.compiles = time.monotonic() - self._started, dict(self._compiler.counts)

  def _report(self, state: RunState) -> RunReport:
    more = ('lm_eval',) if self.options.evaluate.has_tasks else ()
    inputs, definitions = self._inputs, self._quality.definitions
    report = run_report(self.options, inputs.model, inputs.budget, state, definitions)
    if not self.options.prune.prunes:
      report['teacher'] = described_source(inputs.reference.source)
    return report | {'command': self._command, 'versions': versions(*more)}

  def _page(self, report: RunReport, running: bool) -> None:
    if is_first():
      events = self._metrics.read()
      run_page.write(self._workdir.page, report, events, command=self._command, running=running)

  def _end(self, state: RunState, config: ModelConfig, params: Params) -> RunReport:
    """Compares the result with the dense model, writes it, and the report and its page."""
    compared = self._quality.compare_with_dense(config, params)
    measured = measured_latency(self.options, self._inputs, config, params)
    gain = measured_gain(self._inputs, config, params, self._export_dtype()) if self._export else None
    self._record_cost(state)
    report = self._report(state)
    if measured:
      report['budget']['measured'] = measured
    for name, value in compared.divergence.items():  # `OWN` is new if the health was off before a resume
      report['texts'].setdefault(name, {})['kl'] = value
    if compared.health:
      report['health'] = compared.health
    if gain:
      report['gain'] = gain
      self._metrics.write('gain', **gain)
    if self._export:
      writer = Writer(
        self.options.export,
        self._workdir.path,
        tokenizer=self._inputs.tokenizer,
        dtype=self._export_dtype(),
        generation=self._inputs.source.generation,
        report=report,
      )
      report['exports'] = writer.write(config, params)
      if of_file := measured_file(self.options, report['exports']):
        report['budget']['measured'] = of_file
    self._page(report, running=False)
    write_report(self._workdir.report, report)
    return report
