"""The inputs of a run, opened and checked."""

import dataclasses
from typing import Any

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import OWN
from adapt_jax.data.train_set import TrainSet
from adapt_jax.data.windows import Blocks
from adapt_jax.export.writer import check_tokenizer
from adapt_jax.machine.processes import say
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.checks import check_run, check_sources, check_teacher, fit_memory
from adapt_jax.pipeline.dense_model import DenseModel
from adapt_jax.pipeline.loader import Loader, evaluation_field
from adapt_jax.pruning.budget import Budget


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The dense model and the data of a run; `train` may be None, and so is `calibration` if nothing is pruned.

  evaluate: windows of each text by its name, `OWN` the last; empty if nothing is measured.
  dtype: dtype of activations and matrix products outside of training. budget: what targets limit.
  teacher: the model to distil from, if the run does.
  """

  model: DenseModel
  tokenizer: Any
  calibration: Blocks | None
  train: TrainSet | None
  evaluate: dict[str, Blocks]
  dtype: Any
  budget: Budget
  teacher: Source | None = None

  def digests(self) -> dict[str, str]:
    """A digest of the models and of each text's windows, by option, to notice changes before a resume."""
    found = {'model.source': self.source.model_digest()}
    if self.calibration is not None:
      found['prune.calibration.source'] = self.calibration.digest()
    if self.train is not None:
      found['train.source'] = self.train.digest()
    if self.teacher is not None and self.teacher is not self.source:
      found['train.distill.source'] = self.teacher.model_digest()
    if self.budget.measured is not None:
      found['prune.latency_table'] = self.budget.digest()
    return found | {evaluation_field(name): blocks.digest() for name, blocks in self.evaluate.items()}

  @property
  def reference(self) -> DenseModel:
    """What results are compared with: the dense model, or the teacher if nothing is pruned."""
    if self.calibration is None and self.teacher is not None:
      return DenseModel(self.teacher)
    return self.model

  @property
  def source(self) -> Source:
    return self.model.source

  @property
  def config(self) -> ModelConfig:
    return self.model.config


def prepare(options: RunOptions) -> Inputs:
  """The inputs of modes accel, prune and recover. Raises InputError for anything that a user must correct."""
  check_sources(options)
  source = open_source(options.model.source)
  check_run(options, source.config, source.dtype)
  fit_memory(options, source.config)
  inputs = load(options, source, Loader(options, source, source.load_tokenizer()))
  warn_without_chats(options, inputs)
  return inputs


def warn_without_chats(options: RunOptions, inputs: Inputs) -> None:
  """Says so if a model with a chat template is calibrated on plain text alone."""
  blocks, tokenizer = inputs.calibration, inputs.tokenizer
  if blocks is None or options.prune.calibration.own or not tokenizer.chat_template:
    return
  if blocks.documents and not blocks.has_chats(tokenizer.bos_token_id):  # not a .npy file, nor self
    say('calibration has neither chats nor text of the model: it may stop answering (prune.calibration.own)')


def load(options: RunOptions, source: Source, loader: Loader) -> Inputs:
  """Loads and tokenises inputs that have passed `check_sources` and `check_run`."""
  model = DenseModel(source, options.prune.compensate == 'bias')
  _ = model.origin  # raises for a damaged lineage.json, which the report needs later
  check_tokenizer(options.export, loader.tokenizer)
  teacher = _open_teacher(options, source, loader.tokenizer)
  speaker = source if options.prune.prunes or teacher is None else teacher
  return Inputs(
    model,
    loader.tokenizer,
    _calibration(options, loader) if options.prune.prunes else None,
    loader.train_set(speaker) if options.train.tokens else None,
    loader.evaluation() | ({OWN: loader.own(speaker)} if options.evaluate.health else {}),
    compute_dtype(options.model.dtype),
    budget_of(options, source.config, source.dtype),
    teacher,
  )


def _calibration(options: RunOptions, loader: Loader) -> Blocks:
  blocks = loader.calibration()
  blocks.draw(options.prune.calibration.samples, options.seed, 0)  # raises if there are too few rows
  return blocks


def _open_teacher(options: RunOptions, source: Source, tokenizer: Any) -> Source | None:
  distill = options.train.distill
  if not options.train.tokens or not distill.alpha:
    return None
  if not distill.source:
    return source
  teacher = open_source(distill.source, 'train.distill.source')
  theirs = teacher.load_tokenizer()
  check_teacher('train.distill.source', teacher.config, theirs, source.config, tokenizer)
  return teacher
