"""Converts options from and to plain dicts, such as those of recipes, and checks every field."""

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from adapt_jax.config import rules
from adapt_jax.config.declare import Declaration, declaration
from adapt_jax.config.options import RunOptions
from adapt_jax.config.targets import Asked, canonical
from adapt_jax.config.values import grid, numbers, strings
from adapt_jax.models.errors import InputError

_LISTS: dict[Any, tuple[Callable[[Any], Any], str]] = {
  str: (strings, 'a list of strings'),
  float: (numbers, 'a list of numbers'),
  dict[str, Any]: (grid, "a list of groups such as {'prune.target': (0.9, 0.8)}"),
}


def defaults() -> dict[str, Any]:
  """Every option with its default, in groups, as in `configs/base.py`."""
  return dataclasses.asdict(RunOptions())


def from_dict(values: Any) -> RunOptions:
  """Builds and checks the options; absent fields have their defaults.

  Raises InputError naming field, value and remedy.
  """
  options: RunOptions = _build(RunOptions, values, '')
  for field, declared in declarations():
    _check(field, declared, get(options, field))
  rules.check(options)
  return options


def _build(cls: Any, values: Any, where: str) -> Any:
  if not isinstance(values, dict):
    raise InputError(f'{where or "the recipe"} = {values!r} must be a group of fields')
  kinds = typing.get_type_hints(cls)
  if unknown := sorted(values.keys() - kinds.keys()):
    hint = like(str(unknown[0]), [*kinds]) or f': choose one of {", ".join(kinds)}'
    raise InputError(f'{_below(where, str(unknown[0]))} is unknown{hint}')
  return cls(**{k: _convert(kinds[k], value, _below(where, k)) for k, value in values.items()})


def like(name: str, known: Sequence[str]) -> str:
  """Asks whether a known name was meant that ends in this one or is like it; '' if there is none."""
  likely = [one for one in known if one.endswith(f'.{name}')] or difflib.get_close_matches(name, known, 1)
  return f': did you mean {likely[0]}?' if likely else ''


def _below(where: str, name: str) -> str:
  return f'{where}.{name}' if where else name


def _convert(kind: Any, value: Any, where: str) -> Any:
  if dataclasses.is_dataclass(kind):
    return _build(kind, value, where)
  if kind == Asked:
    wanted, converted = 'a target, or several, each once', canonical(value)
  elif isinstance(kind, types.GenericAlias):  # a single string or number becomes a tuple
    convert, wanted = _LISTS[typing.get_args(kind)[0]]
    converted = convert(value)
  else:
    whole = isinstance(value, int) and not isinstance(value, bool)
    wanted = f'of type {kind.__name__}'
    converted = float(value) if kind is float and whole else value
    converted = str(value) if kind is str and isinstance(value, bool) else converted  # a choice: train.remat
    converted = converted if isinstance(converted, kind) and (kind is not int or whole) else None
  if converted is None:
    raise InputError(f'{where} = {value!r} must be {wanted}')
  return converted


def _check(where: str, declared: Declaration, value: Any) -> None:
  """Range and choices of one field; InputError if the value is outside."""
  several = isinstance(value, tuple)
  items = value if several else (value,)
  low, high = declared.within or (0, 0)
  if declared.within and not all(low <= item <= high for item in items):
    raise InputError(f'{where} = {value!r} must lie between {low:g} and {high:g}')
  allowed = declared.choices
  if allowed and (len({*items}) < len(items) or not {*(items or ('',))} <= {*allowed}):
    wanted = f'one{" or more" * several} of {", ".join(filter(None, allowed))}'
    raise InputError(f'{where} = {value!r} must be {wanted}{", each once" * several}')


def get(options: RunOptions, field: str) -> Any:
  """The value of a field such as 'prune.target'."""
  return operator.attrgetter(field)(options)


def declarations() -> Iterator[tuple[str, Declaration]]:
  """Name, such as 'prune.target', and declaration of every option, in order."""

  def walk(cls: Any, prefix: str) -> Iterator[tuple[str, Declaration]]:
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
      if declared := declaration(field):
        yield prefix + field.name, declared
      else:
        yield from walk(kinds[field.name], f'{prefix}{field.name}.')

  yield from walk(RunOptions, '')


def choices(field: str) -> tuple[str, ...]:
  """The values that a field may have."""
  return dict(declarations())[field].choices


def flatten(groups: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'prune': {'target': 0.8}} as {'prune.target': 0.8}; tuples become lists, as in JSON."""
  flat: dict[str, Any] = {}
  for name, value in groups.items():
    if isinstance(value, dict):
      flat |= flatten(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat
