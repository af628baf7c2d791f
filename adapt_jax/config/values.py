"""Parses special values: lists, grids, named texts, and `prune.serve`.

Recipes contain them as Python values, the command line as strings.
"""

import math
import re
from typing import Any, NamedTuple

from adapt_jax.config.declare import ALIGNMENT
from adapt_jax.models.errors import InputError

TENSOR_PARALLEL = 'tensor_parallel='
TEXT = 'text'  # the name of texts without one
SELF = 'self'  # as a source: text that the dense model generates
_NAMED = re.compile(r'([A-Za-z][\w-]*)=(.+)')


def strings(value: Any, where: str) -> tuple[str, ...]:
  """One or several strings as a tuple, without empty ones; InputError for anything else."""
  items = (value,) if isinstance(value, str) else value
  if not isinstance(items, (list, tuple)) or not all(isinstance(x, str) for x in items):
    raise InputError(f'{where} = {value!r} must be a list of strings')
  return tuple(x for x in items if x)


def numbers(value: Any, where: str) -> tuple[float, ...]:
  """One or several numbers as a tuple; InputError for anything else."""
  items = value if isinstance(value, (list, tuple)) else (value,)
  try:  # the command line gives strings
    return tuple(float(x) for x in items if x != '')
  except (OverflowError, TypeError, ValueError):  # the first for whole numbers beyond the largest float
    raise InputError(f'{where} = {value!r} must be a list of numbers') from None


def integers(value: Any, where: str) -> tuple[int, ...]:
  """One or several whole numbers as a tuple; InputError for anything else."""
  found = numbers(value, where)
  if any(not math.isfinite(x) or x != int(x) for x in found):
    raise InputError(f'{where} = {value!r} must be a list of whole numbers')
  return tuple(int(x) for x in found)


def grid(value: Any, where: str) -> tuple[dict[str, Any], ...]:
  """The groups {field: values} of a grid; single values become tuples. InputError for anything else."""
  parts = (value,) if isinstance(value, dict) else value
  if not isinstance(parts, (list, tuple)) or not all(isinstance(part, dict) for part in parts):
    raise InputError(f"{where} = {value!r} must be a list of groups such as {{'prune.target': (0.9, 0.8)}}")
  found = []
  for part in parts:
    values = {k: tuple(v) if isinstance(v, (list, tuple)) else (v,) for k, v in part.items()}
    if not part or not all(values.values()) or not all(isinstance(k, str) for k in part):
      raise InputError(f'{where} has {part!r}: name fields, with one or more values for each')
    found.append(values)
  return tuple(found)


class Multiples(NamedTuple):
  """The numbers that the widths of every layer must be multiples of; kv: KV heads, with their query heads."""

  kv: int
  ffn: int


def serving_multiples(serve: str) -> Multiples:
  """The multiples for a value of `prune.serve`; InputError for an unknown value.

  gguf: llama.cpp's 4- and 8-bit types store rows in blocks of 32 numbers, and fall back to larger types
  for rows not divisible by 32. awq: GPTQ and AWQ have groups of 128. tensor_parallel=n: n devices split every
  layer evenly.
  """
  if serve == 'any':
    return Multiples(1, 1)
  if serve == 'gguf':
    return Multiples(1, 32)
  if serve == 'awq':
    return Multiples(1, 128)
  count = serve.removeprefix(TENSOR_PARALLEL)
  if count != serve and count.isdecimal() and ALIGNMENT[0] <= int(count) <= ALIGNMENT[1]:
    return Multiples(int(count), int(count))
  raise InputError(
    f'prune.serve = {serve!r}: choose any, gguf, awq, or {TENSOR_PARALLEL}n for a number n of devices'
  )


def named_texts(source: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
  """Entries such as 'web=pages.jsonl' by name, in order; entries without a name belong to `TEXT`."""
  found: dict[str, list[str]] = {}
  for entry in source:
    named = _NAMED.fullmatch(entry)
    name, place = named.groups() if named else (TEXT, entry)
    found.setdefault(name, []).append(place)
  return {name: tuple(places) for name, places in found.items()}
