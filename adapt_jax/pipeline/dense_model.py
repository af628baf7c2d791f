"""The model that a run starts from: a source, and the biases that the run adds to it."""

import dataclasses
import functools
from typing import Any

import jax

from adapt_jax.config.options import RunOptions
from adapt_jax.export.writer import origin
from adapt_jax.machine import mesh
from adapt_jax.machine.mesh import load_source
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.source import Source
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.workdir import begun_with
from adapt_jax.pruning import surgery
from adapt_jax.reports.origin import Origin
from adapt_jax.training.precision import chosen
from adapt_jax.training.rate import with_rate


@dataclasses.dataclass(frozen=True)
class DenseModel:
  """The dense model, opened but not loaded.

  output_bias: whether the run needs biases on the output projections; missing ones are added as zeros.
  """

  source: Source
  output_bias: bool = False

  @functools.cached_property
  def origin(self) -> Origin:
    """The model from which earlier runs made the source."""
    return origin(self.source)

  @property
  def config(self) -> ModelConfig:
    """The source's config, with the run's biases."""
    return with_output_bias(self.source.config, self.output_bias)

  def load_params(self, dtype: Any) -> Params:
    """The parameters in `dtype`; None keeps each tensor's own dtype."""
    params = load_source(self.source, dtype)
    return mesh.jit(self._with_biases, params)(params) if self.output_bias else params

  def abstract_params(self, dtype: Any) -> Params:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`."""
    shapes = self.source.abstract_params(dtype)
    return jax.eval_shape(self._with_biases, shapes) if self.output_bias else shapes

  def _with_biases(self, params: Params) -> Params:
    return surgery.with_output_bias(self.source.config, params)[1]


def with_learning_rate(options: RunOptions, source: Source) -> RunOptions:
  """The options with the learning rate that fits the source's weights, if the run trains and names none.

  It is that of the first process, on all. Raises InputError if train.min_lr is above it.
  """
  if not options.train.tokens:
    return options
  train = with_rate(options.train, source.stored_params())
  lr, low = decide(lambda: [train.lr, train.min_lr])
  if options.train.lr < 0:
    say(f'learning rate: {lr:g}, in proportion to the weights (train.lr)')
  return dataclasses.replace(options, train=dataclasses.replace(train, lr=lr, min_lr=low))


def with_training_dtype(options: RunOptions, workdir: str) -> RunOptions:
  """The options with a `train.dtype`, not auto: that of the run in `workdir`, or what suits this machine.

  All processes get that of the first. Call it outside of a mesh. Raises InputError if run.json is damaged.
  """
  asked = options.training_dtype
  if any('model.dtype' in fields for fields in options.compare.grid):
    return options  # each cell of a grid has its own
  if asked == 'auto':
    asked = decide(lambda: begun_with(workdir, 'train.dtype') or chosen(asked))
  return dataclasses.replace(options, train=dataclasses.replace(options.train, dtype=asked))


def with_output_bias(config: ModelConfig, biased: bool) -> ModelConfig:
  """The config of the model, with biases on the output projections if `biased`."""
  return dataclasses.replace(config, output_bias=True) if biased else config
