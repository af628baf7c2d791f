"""The model that a run starts from: a source, the biases that the run adds to it, and its hidden size."""

import dataclasses
import functools
from typing import Any

import jax

from adapt_jax.config.options import RunOptions
from adapt_jax.export.writer import lineage
from adapt_jax.machine import mesh
from adapt_jax.machine.mesh import load_source
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.source import Source
from adapt_jax.models.formats.trimmed_source import TrimmedSource
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning import surgery
from adapt_jax.pruning.narrow import narrowed_config
from adapt_jax.reports.report import base_of
from adapt_jax.training.rate import with_rate


@dataclasses.dataclass(frozen=True)
class DenseModel:
  """The dense model, opened but not loaded.

  output_bias: whether the run needs biases on the output projections; missing ones are added as zeros.
  hidden: prune.hidden, the hidden size to which the run narrows the model first; 0 if it does not.
  """

  source: Source
  output_bias: bool = False
  hidden: int = 0

  @functools.cached_property
  def base(self) -> dict[str, Any]:
    """Name and size of the model from which earlier runs made the source; empty if we did not write it."""
    made_by = lineage(self.original)
    base = base_of(made_by['model']) if made_by else {}
    return {} if self.source.hub and base.get('hub') is False else base  # an id is of more use than a path

  @property
  def original(self) -> Source:
    """The source before its vocabulary was trimmed; the source itself if it was not."""
    return original(self.source)

  @property
  def whole(self) -> ModelConfig:
    """The config before the model is narrowed."""
    return with_output_bias(self.source.config, self.output_bias)

  @property
  def start(self) -> ModelConfig:
    """The config of what is pruned, without the run's biases."""
    return narrowed_config(self.source.config, self.hidden)

  @property
  def config(self) -> ModelConfig:
    """The config of what is pruned."""
    return with_output_bias(self.start, self.output_bias)

  def load_params(self, dtype: Any) -> Params:
    """The parameters of `whole` in `dtype`; None keeps each tensor's own dtype."""
    params = load_source(self.source, dtype)
    return mesh.jit(self._with_biases, params)(params) if self.output_bias else params

  def abstract_params(self, dtype: Any) -> Params:
    """Shapes and dtypes of the parameters of `config`, as `jax.ShapeDtypeStruct`."""
    shapes = self.source.abstract_params(dtype)
    shapes = jax.eval_shape(self._with_biases, shapes) if self.output_bias else shapes
    if not self.hidden:
      return shapes
    narrow = llama.abstract_params(self.config)
    return jax.tree.map(lambda x, of: jax.ShapeDtypeStruct(x.shape, of.dtype), narrow, shapes)

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


def original(source: Source) -> Source:
  """The source before its vocabulary was trimmed; the source itself if it was not."""
  return source.original if isinstance(source, TrimmedSource) else source


def with_output_bias(config: ModelConfig, biased: bool) -> ModelConfig:
  """The config of the model, with biases on the output projections if `biased`."""
  return dataclasses.replace(config, output_bias=True) if biased else config
