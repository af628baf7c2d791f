"""A run of prune.method = slicegpt: slices the dense model, measures it and writes it.

It has no plan, no stages and no training, since no groups are removed: the residual stream becomes narrower.
It takes minutes and saves nothing in between: a run that was killed starts again.
"""

import time

import jax

from adapt_jax.config.identity import settings
from adapt_jax.config.options import RunOptions
from adapt_jax.machine import preemption
from adapt_jax.machine.preemption import Preempted
from adapt_jax.models.config import count_params
from adapt_jax.pipeline.base_run import BaseRun
from adapt_jax.pipeline.run import Run
from adapt_jax.pipeline.run_report import first
from adapt_jax.pipeline.schedule import target_cost
from adapt_jax.pipeline.state import RunState
from adapt_jax.pruning import programs, slicegpt
from adapt_jax.pruning.plan import PruneState
from adapt_jax.reports.report import RunReport, StageReport


def run_class(options: RunOptions) -> type[Run] | type['SliceRun']:
  """What runs these options."""
  return SliceRun if options.prune.method == slicegpt.METHOD else Run


class SliceRun(BaseRun):
  """One run in its workdir."""

  def execute(self) -> RunReport:
    """Slices and measures, writes the exports and report.json; returns the report. Raises `Preempted`."""
    self._metrics.cut(0)
    self._metrics.track(self.options.tracker, settings(self.options))
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
    options, config = self.options, self._inputs.config
    target = target_cost(self._inputs.budget, options.prune.limit)
    params = self._inputs.model.load_params(None)
    state = RunState({'params': params}, (start := PruneState.start(config)).plan, start)
    state.dense = self._quality.perplexity(config, params, 'dense', 0, 0)
    self._measure_tasks(state, config, params, 'dense')
    del params
    began = time.monotonic()
    small = slicegpt.sliced_config(config, slicegpt.width_for(config, target))
    params = slicegpt.slice_model(
      config,
      state.arrays.pop('params'),
      self._tokens(),
      small.hidden_size,
      dtype=self._inputs.dtype,
      compiler=self._compiler,
    )
    params = self._rounded(small, params)
    perplexity = self._quality.perplexity(small, params, 'pruned', 1, 0, last=True)
    self._measure_tasks(state, small, params, 'pruned')
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
    return self._end(state, small, params)

  def _tokens(self) -> jax.Array:
    """Calibration rows [M, B, T]."""
    calibration, blocks = self.options.prune.calibration, self._inputs.calibration
    assert blocks is not None
    rows = blocks.tokens[blocks.draw(calibration.samples, self.options.seed, 0)]
    return jax.device_put(rows.reshape(-1, programs.micro_batch(calibration), rows.shape[1]))
