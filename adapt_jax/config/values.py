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
OWN = 'own'  # the name of such a text, on which `evaluate.health` measures perplexity
# Types of the tensors of a .gguf file.
GGUF_TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_K_M', 'Q5_K_M', 'Q6_K')
GGUF_QUANTISED, K_QUANTS = GGUF_TYPES[3:], GGUF_TYPES[5:]
GGUF_BLOCK, K_BLOCK = 32, 256  # weights of a row that share a scale, and that a K-quant packs together
_NAMED = re.compile(r'([A-Za-z][\w-]*)=(.+)')


def _listed(value: Any) -> tuple[Any, ...]:
  return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def strings(value: Any) -> tuple[str, ...] | None:
  """One or several strings as a tuple, without empty ones; None for anything else."""
  items = _listed(value)
  return tuple(x for x in items if x) if all(isinstance(x, str) for x in items) else None


def numbers(value: Any) -> tuple[float, ...] | None:
  """One or several numbers, of which the command line gives strings, as a tuple; None for anything else."""
  try:
    return tuple(float(x) for x in _listed(value) if x != '')
  except (OverflowError, TypeError, ValueError):  # the first for whole numbers beyond the largest float
    return None


def grid(value: Any) -> tuple[dict[str, Any], ...] | None:
  """The groups {field: values} of a grid; single values become tuples. None for anything else."""
  parts = _listed(value)
  if not all(isinstance(part, dict) and part and all(isinstance(k, str) for k in part) for part in parts):
    return None
  groups = tuple({field: _listed(values) for field, values in part.items()} for part in parts)
  return groups if all(all(group.values()) for group in groups) else None


class Multiples(NamedTuple):
  """What widths must be multiples of: KV heads (with their query heads) and MLP channels, the hidden size."""

  kv: int
  ffn: int
  hidden: int


def serving_multiples(serve: str) -> Multiples:
  """The multiples for a value of `prune.serve`; InputError for an unknown value.

  gguf: llama.cpp's 4- and 8-bit types store rows in blocks of 32 numbers, and fall back to larger types
  for rows not divisible by 32. awq: GPTQ and AWQ have groups of 128. tensor_parallel=n: n devices split every
  layer evenly.
  """
  named = {'any': (1, 1, 1), 'gguf': (1, 32, 32), 'awq': (1, 128, 128)}
  multiples = []
  for entry in serve.split(','):
    count = entry.removeprefix(TENSOR_PARALLEL)
    if count != entry and count.isdecimal() and ALIGNMENT[0] <= int(count) <= ALIGNMENT[1]:
      named[entry] = (int(count), int(count), 1)
    if entry not in named:
      raise InputError(
        f'prune.serve = {serve!r}: choose any, gguf, awq, or {TENSOR_PARALLEL}n for a number n of devices'
      )
    multiples.append(named[entry])
  return Multiples(*(math.lcm(*of) for of in zip(*multiples, strict=True)))


def named_texts(source: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
  """Entries such as 'web=pages.jsonl' by name, in order; entries without a name belong to `TEXT`."""
  texts: dict[str, list[str]] = {}
  for entry in source:
    named = _NAMED.fullmatch(entry)
    name, place = named.groups() if named else (TEXT, entry)
    texts.setdefault(name, []).append(place)
  return {name: tuple(places) for name, places in texts.items()}


def plain(value: Any) -> str:
  """A value as in a command: sources joined by commas, strings without quotes."""
  return ','.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
