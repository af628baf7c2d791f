"""Perplexity and task scores of a run's models, as far as the config asks for them."""

from typing import Any

from adapt_jax.config.options import RunOptions
from adapt_jax.evaluation.harness import TaskScores, evaluate_tasks
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.compiler import Compiler
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.shared import Shared
from adapt_jax.reports.report import Of
from models.config import ModelConfig
from models.network.llama import Params


def dense_key(options: RunOptions) -> Any:
  """All that the dense model's figures depend on, for `Shared`."""
  # Biases that a run adds are zeros, but its program may round otherwise.
  return options.model, options.data, options.evaluate, options.prune.compensate == 'bias'


class Quality:
  """Measures models of one run, and logs what it finds.

  Args:
    options, inputs: of the run.
    metrics: its log.
    shared: with other runs on the same dense model, which is measured once.
    compiler: counts compiles as `evaluation` and `harness`.
  """

  def __init__(
    self, options: RunOptions, inputs: Inputs, metrics: MetricsLog, shared: Shared, *, compiler: Compiler
  ):
    self._options, self._inputs, self._metrics, self._shared = options, inputs, metrics, shared
    self._common: dict[str, Any] = {'compiler': compiler, 'dtype': inputs.dtype}
    self._evaluator = None
    if inputs.evaluate is not None:
      self._evaluator = Evaluator(inputs.evaluate, options.evaluate.batch, **self._common)

  @property
  def definition(self) -> str | None:
    """What perplexity is, in words; None if none is measured."""
    return self._evaluator.definition if self._evaluator else None

  def perplexity(self, config: ModelConfig, params: Params, of: Of, stage: int, step: int) -> float | None:
    """Of the dense model (stage 0), or of a stage's, after `step` training steps; None without a text."""
    if self._evaluator is None:
      return None
    known, key = self._shared.dense, dense_key(self._options)
    if of == 'dense' and key in known:
      value = known[key]
    else:
      title = of if of == 'dense' else f'stage {stage} {of}'
      value = self._evaluator.perplexity(config, params, f'{title}: evaluate')
    if of == 'dense':
      known[key] = value
    self._metrics.write('evaluate', of=of, stage=stage, step=step, perplexity=value)
    return value

  def tasks(self, config: ModelConfig, params: Params, of: Of, step: int) -> TaskScores:
    """Scores of the dense model, or of the last stage's, after `step` training steps."""
    known, key = self._shared.tasks, dense_key(self._options)
    if of == 'dense' and key in known:
      scores = known[key]
    else:
      options, tokenizer = self._options.evaluate, self._inputs.tokenizer
      scores = evaluate_tasks(options, config, params, tokenizer, title=f'{of}: tasks', **self._common)
    if of == 'dense':
      known[key] = scores
    self._metrics.write('tasks', of=of, step=step, scores=scores)
    return scores
