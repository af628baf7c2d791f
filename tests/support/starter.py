"""Starts runs quickly, for tests that start many: imports done once, compiled programs kept on disk."""

import json
import os
import pathlib
import subprocess
import sys

from tests.support import runs

FORKSERVER = pathlib.Path(__file__).with_name('forkserver.py')


class Starter:
  """Starts runs of `runs.make_config` one after another, quickly: compiled programs are kept on disk."""

  def __init__(self, path: pathlib.Path, files: pathlib.Path, *prefix: str):
    self.path, self._files = path, files
    self.output = path / 'output.txt'
    cache = {
      'JAX_COMPILATION_CACHE_DIR': str(files / 'cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    self._process = subprocess.Popen(
      [*prefix, sys.executable, str(FORKSERVER)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | cache,
    )

  @property
  def pid(self) -> int:
    return self._process.pid

  def start(self, workdir, *flags, devices=1, limit=None, kill='', after=None) -> int:
    """The pid of a run that has begun, on so many simulated devices."""
    argv = runs.command(self._files, workdir, *flags)[1:]
    request = {'argv': argv, 'output': str(self.output), 'devices': devices, 'limit': limit}
    request |= {'kill': kill, 'after': after or {}}
    self.output.unlink(missing_ok=True)
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return int(self._process.stdout.readline())

  def wait(self) -> tuple[int, str]:
    """Exit code and output of the run that was started last."""
    code = int(self._process.stdout.readline())
    return code, self.output.read_text()

  def run(self, workdir, *flags, **options) -> tuple[int, str]:
    """The same from start to end."""
    self.start(workdir, *flags, **options)
    return self.wait()

  def close(self) -> None:
    self._process.communicate()
