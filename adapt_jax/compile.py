"""Programs compiled ahead of time, so that each compile is counted and no call can recompile."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax


class Programs:
  """Compiled programs that runs of one process share; of each name the `most` used last are kept."""

  def __init__(self, most: int = 8):
    self._most = most
    self._found: dict[str, collections.OrderedDict[Any, Any]] = {}

  def get(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
    """The program of `key`, made if there is none."""
    found = self._found.setdefault(name, collections.OrderedDict())
    if key not in found:
      found[key] = make()
    found.move_to_end(key)
    if len(found) > self._most:
      found.popitem(last=False)
    return found[key]


class Compiler:
  """Compiles and counts by name.

  `counts` is per name, without what `programs` already had. A compiled program called with other shapes or
  dtypes raises TypeError instead of compiling again.
  """

  def __init__(self, programs: Programs | None = None) -> None:
    self.counts: dict[str, int] = {}
    self._programs = programs

  def __call__(
    self, name: str, fn: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
  ) -> Any:
    """`fn` compiled for the shapes and dtypes of `args` (arrays or `jax.ShapeDtypeStruct`).

    Shared are programs whose `fn` is a dataclass: only these tell by their values that they are the same.
    """

    def compile() -> Any:
      program = jax.jit(fn, donate_argnums=donate_argnums).lower(*args).compile()
      self.counts[name] = self.counts.get(name, 0) + 1
      return program

    if self._programs is None or not dataclasses.is_dataclass(fn):
      return compile()
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((tuple(x.shape), str(x.dtype)) for x in leaves)
    return self._programs.get(name, (fn, structure, shapes, donate_argnums), compile)
