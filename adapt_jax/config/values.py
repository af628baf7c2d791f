"""Values of fields that hold several: a recipe gives them as Python has them, the command line as strings."""

from typing import Any

from models.errors import InputError


def strings(value: Any, where: str) -> tuple[str, ...]:
  """One string, or several, as a tuple without empty ones; InputError for anything else."""
  items = (value,) if isinstance(value, str) else value
  if not isinstance(items, (list, tuple)) or not all(isinstance(x, str) for x in items):
    raise InputError(f'{where} = {value!r} must be a list of strings')
  return tuple(x for x in items if x)


def numbers(value: Any, where: str) -> tuple[float, ...]:
  """One number, or several; InputError for anything else."""
  items = value if isinstance(value, (list, tuple)) else (value,)
  try:  # the command line gives strings
    return tuple(float(x) for x in items if x != '')
  except (TypeError, ValueError):
    raise InputError(f'{where} = {value!r} must be a list of numbers') from None


def integers(value: Any, where: str) -> tuple[int, ...]:
  """One whole number, or several; InputError for anything else."""
  found = numbers(value, where)
  if any(x != int(x) for x in found):
    raise InputError(f'{where} = {value!r} must be a list of whole numbers')
  return tuple(int(x) for x in found)


def grid(value: Any, where: str) -> tuple[dict[str, Any], ...]:
  """Groups {field: values} of a grid, a lone value as a tuple of one; InputError for anything else."""
  parts = (value,) if isinstance(value, dict) else value
  if not isinstance(parts, (list, tuple)) or not all(isinstance(part, dict) for part in parts):
    raise InputError(f"{where} = {value!r} must be a list of groups such as {{'prune.target': (0.9, 0.8)}}")
  found = []
  for part in parts:
    values = {k: tuple(v) if isinstance(v, (list, tuple)) else (v,) for k, v in part.items()}
    if not part or not all(values.values()) or not all(isinstance(k, str) for k in part):
      raise InputError(f'{where} has {part!r}: name fields, and one value or more for each')
    found.append(values)
  return tuple(found)
