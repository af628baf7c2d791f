"""The cells of a grid over config fields: their values, order and names.

This module does not need numpy or JAX.
"""

import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from adapt_jax.config.build import flatten
from adapt_jax.config.values import plain
from adapt_jax.models.errors import InputError

Grid = Sequence[dict[str, tuple[Any, ...]]]
Tree = dict[str, Any]

_LONGEST_NAME = 80
_SPENT_LAST = 'prune.target'  # cells that differ only in it share pruning steps


@dataclasses.dataclass(frozen=True)
class Cell:
  """One cell. values: of every field that varies in the grid. name: of its directory, unique."""

  values: dict[str, Any]
  name: str

  @property
  def label(self) -> str:
    """All values for messages: 'prune.method=adapt prune.target=0.8'."""
    return ' '.join(f'{field}={plain(value)}' for field, value in self.values.items())


def assign(tree: Tree, values: dict[str, Any]) -> Tree:
  """A copy of `tree` with the dotted fields of `values` set."""
  tree = copy.deepcopy(tree)
  for field, value in values.items():
    *groups, last = field.split('.')
    node = tree
    for part in groups:
      node = node[part]
    node[last] = value
  return tree


def fields(grid: Grid) -> list[str]:
  """All fields that the grid names, in its order."""
  return list(dict.fromkeys(field for part in grid for field in part))


def expand(grid: Grid, base: Tree) -> list[Cell]:
  """The union of the products of the grid's parts, each cell once, in the order in which to run them.

  Fields that a part does not name have the value of `base`. Cells that differ only in prune.target follow
  each other, larger targets first. Raises InputError for an unknown field.
  """
  known, found = flatten(base), dict[str, dict[str, Any]]()
  for field in fields(grid):
    if field not in known:
      close = difflib.get_close_matches(field, known, 1)
      raise InputError(
        f'compare.grid varies {field!r}, which is no option{f": {close[0]}?" if close else ""}'
      )
  defaults = {field: _frozen(known[field]) for field in fields(grid)}
  for part in grid:
    for product in itertools.product(*part.values()):
      given = zip(part, product, strict=True)
      values = defaults | {field: _like(defaults[field], value) for field, value in given}
      found.setdefault(json.dumps(values, default=str), values)
  rest = list(dict.fromkeys(map(_rest, found.values())))
  order = sorted(found.values(), key=lambda v: (rest.index(_rest(v)), _descending(v.get(_SPENT_LAST))))
  return [Cell(values, name) for values, name in zip(order, _names(order, defaults), strict=True)]


def _rest(values: dict[str, Any]) -> str:
  return json.dumps({k: v for k, v in values.items() if k != _SPENT_LAST}, default=str)


def _descending(target: Any) -> float:
  return -target if isinstance(target, (int, float)) else 0.0


def _frozen(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def _like(default: Any, value: Any) -> Any:
  """`value` converted as in options, so that 1 and 1.0, or 'a.txt' and ('a.txt',), are one cell."""
  if isinstance(default, tuple) and isinstance(value, str):
    return (value,)
  if isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value) + 0.0  # -0.0 is 0.0
  return _frozen(value)


def _names(cells: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> Iterator[str]:
  """A directory name for each cell, with a hash of the values if the name does not show them in full.

  Only values that differ from `defaults` are used, so that adding a field to the grid keeps the names.
  """
  for cell in cells:
    values = {field: value for field, value in cell.items() if value != defaults[field]}
    parts, whole = [], True
    for field, value in values.items():
      text = ','.join(map(_stem, value)) if isinstance(value, tuple) else str(value)
      slug = re.sub(r'[^A-Za-z0-9.+-]+', '-', text).strip('-.')
      whole &= slug == plain(value)
      parts.append(f'{field}-{slug}')
    name = '_'.join(parts) or 'base'
    if not whole or len(name) > _LONGEST_NAME:
      digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
      name = f'{name[: _LONGEST_NAME - 9]}_{digest[:8]}'
    yield name


def _stem(value: Any) -> str:
  """A text's name without directory and suffix; other values, such as weights, in full."""
  return pathlib.PurePath(value).stem if isinstance(value, str) else str(value)
