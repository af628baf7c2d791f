"""What a runtime asks of a pruned model's widths (`prune.serve`). Numpy and JAX are not needed here."""

from typing import NamedTuple

from models.config import ModelConfig
from models.errors import InputError

_TENSOR_PARALLEL = 'tensor_parallel='


class Multiples(NamedTuple):
  """What the widths of every layer are to be multiples of; query heads follow their KV heads."""

  kv: int
  ffn: int


def multiples(serve: str) -> Multiples:
  """Of a value of `prune.serve`; InputError for another.

  gguf: llama.cpp's 4- and 8-bit types store rows in blocks of 32 numbers, and fall back to larger types
  for rows that 32 does not divide. tensor_parallel=n: n devices share every layer alike.
  """
  if serve == 'any':
    return Multiples(1, 1)
  if serve == 'gguf':
    return Multiples(1, 32)
  count = serve.removeprefix(_TENSOR_PARALLEL)
  if count != serve and count.isdecimal() and 1 <= int(count) <= 65_536:
    return Multiples(int(count), int(count))
  raise InputError(
    f'config.prune.serve = {serve!r}: choose any, gguf, or {_TENSOR_PARALLEL}n for a number n of devices'
  )


def check_model(serve: str, config: ModelConfig) -> None:
  """Raises InputError where a layer, which pruning may leave whole, is not what `serve` asks for."""
  asked = multiples(serve)
  for i, shape in enumerate(config.layers):
    for name, width, of in (
      ('KV heads', shape.num_kv_heads, asked.kv),
      ('MLP channels', shape.ffn, asked.ffn),
    ):
      if width % of:
        remedy = 'any' if serve == 'gguf' else f'any, or {_TENSOR_PARALLEL}n with an n that divides them'
        raise InputError(
          f'config.prune.serve = {serve!r} asks for multiples of {of}, but layer {i} of model.source has '
          f'{width} {name}: choose {remedy}'
        )
