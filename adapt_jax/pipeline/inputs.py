"""The inputs of a run, opened and checked."""

import dataclasses
from typing import Any

from adapt_jax.config.options import RunOptions
from adapt_jax.data.train_set import TrainSet
from adapt_jax.data.windows import Blocks
from adapt_jax.export.writer import check_tokenizer
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.formats.trimmed_source import TrimmedSource
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.checks import check_run, check_size, check_sources
from adapt_jax.pipeline.dense_model import DenseModel, original
from adapt_jax.pipeline.loader import Loader, evaluation_field
from adapt_jax.pipeline.vocabulary import with_vocabulary
from adapt_jax.pruning.budget import Budget


@dataclasses.dataclass(frozen=True)
class WholeModel:
  """The dense model before its vocabulary is trimmed, and the windows of each text in its own tokens."""

  source: Source
  tokenizer: Any
  evaluate: dict[str, Blocks]


@dataclasses.dataclass(frozen=True)
class Inputs:
  """The dense model and the data of a run; `train` may be None.

  evaluate: windows of each text by its name; empty if nothing is measured.
  dtype: dtype of activations and matrix products. budget: what targets limit.
  untrimmed: what the model was before prune.vocab, if that is set.
  """

  model: DenseModel
  tokenizer: Any
  calibration: Blocks
  train: TrainSet | None
  evaluate: dict[str, Blocks]
  dtype: Any
  budget: Budget
  untrimmed: WholeModel | None = None

  def digests(self) -> dict[str, str]:
    """A digest of the model and of each text's windows, by option, to notice changes before a resume."""
    found = {'model.source': self.source.model_digest()}
    if isinstance(self.source, TrimmedSource):  # before the texts, all of whose tokens it changes
      found['prune.vocab'] = self.source.digest()
    found['prune.calibration.source'] = self.calibration.digest()
    if self.train is not None:
      found['train.source'] = self.train.digest()
    if self.budget.kind == 'latency':
      found['prune.latency_table'] = self.budget.digest()
    return found | {evaluation_field(name): blocks.digest() for name, blocks in self.evaluate.items()}

  @property
  def source(self) -> Source:
    return self.model.source

  @property
  def config(self) -> ModelConfig:
    return self.model.config


def prepare(options: RunOptions) -> Inputs:
  """The inputs of modes accel and prune. Raises InputError for anything that a user must correct."""
  check_sources(options)
  source = open_source(options.model.source)
  check_run(options, source.config, source.dtype)
  source = with_vocabulary(options, source)
  loader, whole = Loader(options, source, source.load_tokenizer()), original(source)
  of_whole = loader if whole is source else Loader(options, whole, whole.load_tokenizer())
  return load(options, source, loader, of_whole)


def load(options: RunOptions, source: Source, loader: Loader, whole: Loader) -> Inputs:
  """Loads and tokenises inputs that have passed `check_sources` and `check_run`.

  whole: the loader of the source before its vocabulary was trimmed; used if it was.
  """
  model = DenseModel(source, options.prune.compensate == 'bias', options.prune.hidden)
  _ = model.base  # raises for a damaged lineage.json, which the report needs later
  budget = budget_of(options, model.start, source.dtype, model.original.config)
  if isinstance(source, TrimmedSource):
    check_size(options, model.start, budget)
  check_tokenizer(options.export, loader.tokenizer)
  calibration = options.prune.calibration
  blocks = loader.calibration()
  blocks.draw(calibration.samples, options.seed, 0)  # raises if there are too few rows
  train = loader.train_set() if options.train.tokens else None
  dtype = compute_dtype(options.model.dtype)
  untrimmed = None
  if isinstance(source, TrimmedSource):
    untrimmed = WholeModel(source.original, whole.tokenizer, whole.evaluation())
  return Inputs(model, loader.tokenizer, blocks, train, loader.evaluation(), dtype, budget, untrimmed)
