"""Programs compiled ahead of time, so that each compile is counted and no call can recompile."""

import time
from collections.abc import Callable
from typing import Any

import jax


class Compiler:
  """Compiles and counts by name.

  `counts` and `seconds` are per name. A compiled program called with other shapes or dtypes raises
  TypeError instead of compiling again.
  """

  def __init__(self) -> None:
    self.counts: dict[str, int] = {}
    self.seconds: dict[str, float] = {}

  def __call__(
    self, name: str, fn: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
  ) -> Any:
    """`fn` compiled for the shapes and dtypes of `args` (arrays or `jax.ShapeDtypeStruct`)."""
    start = time.perf_counter()
    program = jax.jit(fn, donate_argnums=donate_argnums).lower(*args).compile()
    self.counts[name] = self.counts.get(name, 0) + 1
    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
    return program
