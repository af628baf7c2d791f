"""Widths that the serving program and the mesh support (`prune.serve`)."""

import dataclasses
import math

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import TENSOR_PARALLEL, serving_multiples
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import sharding


def aligned(options: RunOptions) -> RunOptions:
  """The options with prune.align_kv and align_ffn for prune.serve and the mesh's `tensor` axis."""
  mesh = sharding.mesh()
  tensor = mesh.shape['tensor'] if mesh is not None else 1
  asked = serving_multiples(options.prune.serve)
  prune = dataclasses.replace(
    options.prune,
    align_kv=math.lcm(options.prune.align_kv, asked.kv, tensor),
    align_ffn=math.lcm(options.prune.align_ffn, asked.ffn, tensor),
  )
  return dataclasses.replace(options, prune=prune)


def check_hidden(serve: str, hidden: int) -> None:
  """Raises InputError if narrow.hidden, the length of most rows, does not fit the blocks of `serve`."""
  if serve in ('gguf', 'awq') and hidden % (of := serving_multiples(serve).ffn):
    raise InputError(f'narrow.hidden = {hidden} must be a multiple of {of} for prune.serve = {serve!r}')


def check_model(serve: str, config: ModelConfig) -> None:
  """Raises InputError if `serve` does not allow a layer's widths, which pruning may leave unchanged."""
  asked = serving_multiples(serve)
  for i, shape in enumerate(config.layers):
    for name, width, of in (
      ('KV heads', shape.num_kv_heads, asked.kv),
      ('MLP channels', shape.ffn, asked.ffn),
    ):
      if width % of:
        remedy = (
          'any' if serve in ('gguf', 'awq') else f'any, or {TENSOR_PARALLEL}n with an n that divides them'
        )
        raise InputError(
          f'prune.serve = {serve!r} asks for multiples of {of}, but layer {i} of model.source has '
          f'{width} {name}: choose {remedy}'
        )
