"""For which kind of device programs are made: the forms of some operations differ."""

import contextlib
from collections.abc import Iterator

import jax

_planned_for: list[str] = []


def on_cpu() -> bool:
  """Whether what is traced now is to run on a CPU."""
  return (_planned_for[-1] if _planned_for else jax.default_backend()) == 'cpu'


@contextlib.contextmanager
def made_for(platform: str) -> Iterator[None]:
  """What is traced inside takes the forms of that platform: of `gpu`, say, in plans made on a CPU."""
  _planned_for.append(platform)
  try:
    yield
  finally:
    _planned_for.pop()
