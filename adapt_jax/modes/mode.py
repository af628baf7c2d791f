"""What a mode of `--mode` declares: its help, the options that it reads, and the function that runs it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from adapt_jax.config.identity import names, settings
from adapt_jax.config.options import RunOptions


@dataclasses.dataclass(frozen=True)
class Mode:
  """One mode. `registry.MODES` lists all of them.

  Fields and groups of options are named as in `prune.target` and `prune`.

  name, help: for `--mode` and `--help`.
  run: run(options, workdir, command), or run(options, prompts) for a mode without a workdir.
  result: what its result depends on. In a group, only options that change a result count
    (`Declaration.result`); a field that is named itself always counts. Empty: the mode has no workdir.
  reads: what it reads besides.
  settle: checks the options for this mode and sets those that it fixes. Raises InputError.
  devices: returns the devices to plan for, or None for this machine's; it runs before any other use of
    JAX.
  several_processes, mesh: whether it runs in several processes, and on a mesh of all devices.
  grows: whether a workdir with a report may have more to do, as a grid with further cells.
  """

  name: str
  help: str
  run: Callable[..., None]
  result: tuple[str, ...] = ()
  reads: tuple[str, ...] = ()
  settle: Callable[[RunOptions], RunOptions] = lambda options: options
  devices: Callable[[RunOptions], list[Any] | None] | None = None
  several_processes: bool = False
  mesh: bool = True
  grows: bool = False

  def identity(self, options: RunOptions) -> dict[str, Any]:
    """{'mode': …, 'config': the options that the result depends on}, as in `run.json`."""
    return {'mode': self.name, 'config': settings(options, self.result)}

  def uses(self, field: str) -> bool:
    """Whether the mode reads an option such as 'prune.target', even if its result does not depend on it."""
    return names((*self.result, *self.reads), field)
