"""The model that a run starts from: a source, and the biases that the run adds to it."""

import dataclasses
from typing import Any

import jax

from adapt_jax.machine import mesh
from adapt_jax.machine.mesh import load_source
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.source import Source
from adapt_jax.models.formats.trimmed_source import TrimmedSource
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning import surgery


@dataclasses.dataclass(frozen=True)
class DenseModel:
  """The dense model, opened but not loaded.

  output_bias: whether the run needs biases on the output projections; missing ones are added as zeros.
  """

  source: Source
  output_bias: bool = False

  @property
  def original(self) -> Source:
    """The source before its vocabulary was trimmed; the source itself if it was not."""
    return original(self.source)

  @property
  def config(self) -> ModelConfig:
    return with_output_bias(self.source.config, self.output_bias)

  def load_params(self, dtype: Any) -> Params:
    """The source's parameters with the run's biases, in `dtype`; None keeps each tensor's own dtype."""
    params = load_source(self.source, dtype)
    return mesh.jit(self._with_biases, params)(params) if self.output_bias else params

  def abstract_params(self, dtype: Any) -> Params:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`."""
    shapes = self.source.abstract_params(dtype)
    return jax.eval_shape(self._with_biases, shapes) if self.output_bias else shapes

  def _with_biases(self, params: Params) -> Params:
    return surgery.with_output_bias(self.source.config, params)[1]


def original(source: Source) -> Source:
  """The source before its vocabulary was trimmed; the source itself if it was not."""
  return source.original if isinstance(source, TrimmedSource) else source


def with_output_bias(config: ModelConfig, biased: bool) -> ModelConfig:
  """The config of the model, with biases on the output projections if `biased`."""
  return dataclasses.replace(config, output_bias=True) if biased else config
