"""Widths that the serving program and the mesh support (`prune.serve`)."""

import dataclasses

from adapt_jax.config.options import RunOptions
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.config.values import TENSOR_PARALLEL, serving_multiples
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import sharding


def aligned(options: RunOptions) -> RunOptions:
  """The options with the mesh's `tensor` axis in prune.serve, if it asks for other multiples."""
  mesh = sharding.mesh()
  tensor = mesh.shape['tensor'] if mesh is not None else 1
  asked = serving_multiples(options.prune.serve)
  if not (asked.kv % tensor or asked.ffn % tensor):
    return options
  serve = f'{options.prune.serve},{TENSOR_PARALLEL}{tensor}'
  return dataclasses.replace(options, prune=dataclasses.replace(options.prune, serve=serve))


def check_hidden(serve: str, hidden: int) -> None:
  """Raises InputError if narrow.hidden, the length of most rows, does not fit the blocks of `serve`."""
  if hidden % (of := serving_multiples(serve).hidden):
    raise InputError(f'narrow.hidden = {hidden} must be a multiple of {of} for prune.serve = {serve!r}')


def check_model(options: PruneOptions, config: ModelConfig) -> None:
  """Raises InputError if prune.serve does not allow a layer's widths, which pruning may leave unchanged."""
  asked = serving_multiples(options.serve)
  for i, shape in enumerate(config.layers):
    for name, width, of in (
      ('KV heads', shape.num_kv_heads, asked.kv),
      ('MLP channels', shape.ffn, asked.ffn),
    ):
      if width % of:
        raise InputError(
          f'prune.serve = {options.serve!r} asks for multiples of {of}, but layer {i} of model.source has '
          f'{width} {name}: choose any, or a number that divides them'
        )
