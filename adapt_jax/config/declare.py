"""Declares options: dataclass fields whose metadata describe them for readers and checks."""

import dataclasses
from typing import Any

MAX_SPARSITY = 0.99  # of a layer (paper section 3)
ALIGNMENT = (1, 65_536)
COUNT, LENGTH, TOKENS = (1, 10**9), (2, 10**7), (0, 10**15)  # ranges shared by several options


@dataclasses.dataclass(frozen=True)
class Declaration:
  """The description of an option, in addition to its type and default.

  meaning: description for readers.
  within: lowest and highest allowed value; for an option with several values, of each value.
  choices: the allowed values; an option with several values may have each once, and none if '' is a choice.
  result: whether the run's result depends on it. Options that change only memory, speed or the formats of the
    result may differ when a run is resumed.
  """

  meaning: str
  within: tuple[float, float] | None = None
  choices: tuple[str, ...] = ()
  result: bool = True


def option(default: Any, meaning: str, **declared: Any) -> Any:
  """A field with this default; `declared` are other fields of its `Declaration`."""
  return dataclasses.field(default=default, metadata={'declared': Declaration(meaning, **declared)})


def group(options: type) -> Any:
  return dataclasses.field(default_factory=options)


def declaration(field: dataclasses.Field[Any]) -> Declaration | None:
  """The declaration of a field; None for a group of fields."""
  return field.metadata.get('declared')
