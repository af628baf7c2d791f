"""How an option is declared: a dataclass field whose metadata say what a reader and a check need to know."""

import dataclasses
from typing import Any

MAX_SPARSITY = 0.99  # of a layer (paper section 3)
ALIGNMENT = (1, 65_536)
COUNT, LENGTH, TOKENS = (1, 10**9), (2, 10**7), (0, 10**15)  # ranges that several options share


@dataclasses.dataclass(frozen=True)
class Declaration:
  """What is said of an option beside its type and default.

  meaning: for the reader, in plain words.
  within: lowest and highest value, both allowed; of each item where the option holds several.
  choices: the values allowed; of each item where the option holds several, each once. '' allows none.
  result: whether the run's result depends on it. Options that change only memory, speed or the forms of the
    result may differ when a run is resumed.
  """

  meaning: str
  within: tuple[float, float] | None = None
  choices: tuple[str, ...] = ()
  result: bool = True


def option(
  default: Any,
  meaning: str,
  *,
  within: tuple[float, float] | None = None,
  choices: tuple[str, ...] = (),
  result: bool = True,
) -> Any:
  declared = Declaration(meaning, within, choices, result)
  return dataclasses.field(default=default, metadata={'declared': declared})


def group(options: type) -> Any:
  return dataclasses.field(default_factory=options)


def declaration(field: dataclasses.Field[Any]) -> Declaration | None:
  """What is declared of a field; None for a group of fields."""
  return field.metadata.get('declared')
