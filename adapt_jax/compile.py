"""Programs compiled ahead of time, so that each compile is counted and no call can recompile."""

from collections.abc import Callable
from typing import Any

import jax


class Compiler:
  """Compiles and counts by name.

  `counts` is per name. A compiled program called with other shapes or dtypes raises
  TypeError instead of compiling again.
  """

  def __init__(self) -> None:
    self.counts: dict[str, int] = {}

  def __call__(
    self, name: str, fn: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
  ) -> Any:
    """`fn` compiled for the shapes and dtypes of `args` (arrays or `jax.ShapeDtypeStruct`)."""
    program = jax.jit(fn, donate_argnums=donate_argnums).lower(*args).compile()
    self.counts[name] = self.counts.get(name, 0) + 1
    return program
