"""Runs of `runs.make_config` that are started, killed and started again, each quickly."""

import pathlib

from tests.support import runs
from tests.support.forks import Forks, shared


class Starter:
  """Starts runs of `runs.make_config` with some flags one after another, quickly: see `Forks`."""

  def __init__(
    self, path: pathlib.Path, files: pathlib.Path, flags: tuple[str, ...] = (), forks: Forks | None = None
  ):
    self.path, self._files, self._flags = path, files, flags
    self.output = path / 'output.txt'
    self._forks = forks or shared()

  def start(self, workdir, *flags, **options) -> int:
    """The pid of a run that has begun; `options` are those of `Forks.start`."""
    self.output.unlink(missing_ok=True)
    argv = runs.command(self._files, workdir, *self._flags, *flags)[1:]
    return self._forks.start(argv, self.output, **options)

  def wait(self) -> tuple[int, str]:
    """Exit code and output of the run that was started last."""
    return self._forks.wait(), self.output.read_text()

  def run(self, workdir, *flags, **options) -> tuple[int, str]:
    """The same from start to end."""
    self.start(workdir, *flags, **options)
    return self.wait()
