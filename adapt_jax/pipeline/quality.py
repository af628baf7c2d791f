"""Perplexity, task scores and health of a run's models, as requested by the config."""

import time
from typing import Any, NamedTuple

import jax

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import OWN, TEXT
from adapt_jax.evaluation.harness import TaskScores, evaluate_tasks
from adapt_jax.evaluation.health import Health
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.compiler import Compiler, Programs
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.shared import DenseReference, Shared
from adapt_jax.reports.report import PRUNING_NAMES, RECOVERY_NAMES, HealthReport, Of


def dense_key(options: RunOptions) -> Any:
  """Everything that the figures of the dense model (`Inputs.reference`) depend on, for `Shared`."""
  # Biases that a run adds are zeros, but its program may round differently.
  biased, teacher = options.prune.compensate == 'bias', options.train.distill.source
  return options.model, options.data, options.evaluate, biased, '' if options.prune.prunes else teacher


class Comparison(NamedTuple):
  """A model beside the dense one: KL(dense ‖ model) on each text in nats per token; its health, if asked."""

  divergence: dict[str, float]
  health: HealthReport | None


class Quality:
  """Measures the models of one run and logs the results.

  Args:
    options, inputs: those of the run.
    metrics: the run's log.
    shared: caches shared with other runs on the same dense model, which is measured once.
    compiler: counts compiles as `evaluation`, `divergence`, `prefill`, `decode` and `harness`.
  """

  def __init__(
    self,
    options: RunOptions,
    inputs: Inputs,
    metrics: MetricsLog,
    shared: Shared,
    *,
    compiler: Compiler,
  ):
    self._options, self._inputs, self._metrics, self._shared = options, inputs, metrics, shared
    self._common: dict[str, Any] = {'compiler': compiler, 'dtype': inputs.dtype}
    self.seconds = 0.0  # of the last evaluation of perplexity
    self._names = PRUNING_NAMES if options.prune.prunes else RECOVERY_NAMES
    own = inputs.evaluate.get(OWN)
    args = inputs.config, inputs.tokenizer, inputs.source.generation
    self._health = Health(*args, lambda: own, **self._common) if own else None
    programs = Programs(most=2)
    self._evaluators = {
      name: Evaluator(blocks, options.evaluate.batch, **self._common, programs=programs)
      for name, blocks in inputs.evaluate.items()
    }

  @property
  def definitions(self) -> dict[str, str]:
    """The definition of perplexity on each text, in words."""
    by = {OWN: '; the dense model generated the text'}
    return {name: evaluator.definition + by.get(name, '') for name, evaluator in self._evaluators.items()}

  def perplexity(
    self, config: ModelConfig, params: Params, of: Of, stage: int, step: int, *, last: bool = False
  ) -> dict[str, float]:
    """Perplexity on each text, of the dense model (stage 0) or a stage's, after `step` training steps.

    `compare_with_dense` need not run the `last` model again, nor a dense one of the dtype in use.
    """
    known, key, start = self._shared.dense, dense_key(self._options), time.monotonic()
    title = self._names[of] if of == 'dense' else f'stage {stage} {self._names[of]}'
    found = known.get(key, {}) if of == 'dense' else {}
    keep: Any = 'divergence' if last else ''
    # Weights of another dtype would be rounded later than those that `_reference` reads.
    if of == 'dense' and all(x.dtype == self._inputs.dtype for x in jax.tree.leaves(params)):
      keep = 'reference'
    found = found or {
      name: evaluator.perplexity(config, params, self._title(f'{title}: evaluate', name), keep=keep)
      for name, evaluator in self._evaluators.items()
    }
    if of == 'dense':
      known[key] = found
    self.seconds = time.monotonic() - start
    for name, value in found.items():
      self._metrics.write('evaluate', of=of, stage=stage, step=step, text=name, perplexity=value)
    return found

  def compare_with_dense(self, config: ModelConfig, params: Params) -> Comparison:
    """The final model beside the dense one; logs its health."""
    known, key = self._shared.references, dense_key(self._options)
    if not self._evaluators:
      return Comparison({}, None)
    if key not in known:
      known.clear()  # those of another model or text: they would fill the memory
      known[key] = self._reference()
    reference = known[key]
    found = {
      name: self._evaluators[name].divergence(config, params, of_text, self._title('divergence', name))
      for name, of_text in reference.texts.items()
    }
    health = None
    if self._health is not None:
      health = self._health.report(reference.answers, self._health.answers(config, params, 'answers'))
      self._metrics.write('health', **{of: health[of] for of in ('answers', 'dense', 'result')})
    return Comparison(found, health)

  def _reference(self) -> DenseReference:
    """What the dense model, which is read again, says on each text."""
    model = self._inputs.reference
    dense, config = model.load_params(self._inputs.dtype), model.config
    texts = {
      name: evaluator.reference(config, dense, self._title(f'divergence: {self._names["dense"]}', name))
      for name, evaluator in self._evaluators.items()
    }
    health, of = self._health, self._names['dense']
    answers = health.answers(config, dense, f'answers: {of}') if health is not None else []
    return DenseReference(texts, answers)

  def _title(self, title: str, name: str) -> str:
    return title if list(self._evaluators) == [TEXT] else f'{title} {name}'

  def tasks(self, config: ModelConfig, params: Params, of: Of, step: int) -> TaskScores:
    """Task scores of the dense model, or of the last stage's, after `step` training steps."""
    known, key = self._shared.tasks, dense_key(self._options)
    scores = known.get(key) if of == 'dense' else None
    if scores is None:
      args = config, params, self._inputs.tokenizer, self._inputs.source.generation
      scores = evaluate_tasks(self._options.evaluate, *args, title=f'{of}: tasks', **self._common)
    if of == 'dense':
      known[key] = scores
    self._metrics.write('tasks', of=of, step=step, scores=scores)
    return scores
