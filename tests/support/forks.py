"""A process that has imported main.py and forks the runs that tests start: they import nothing again."""

import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import tempfile

FORKSERVER = pathlib.Path(__file__).with_name('forkserver.py')
LONGEST = 600  # seconds that a run may take


class Forks:
  """Starts runs of main.py one after another; `prefix` is a command that starts the process itself."""

  def __init__(self, *prefix: str):
    self._process = subprocess.Popen(
      [*prefix, sys.executable, str(FORKSERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    self._run = 0

  @property
  def pid(self) -> int:
    return self._process.pid

  def start(self, argv, output, errors='', devices=1, limit=None, kill='', after=None) -> int:
    """The pid of a run that has begun: `forkserver.run` says what it is asked."""
    request = {'argv': argv, 'output': str(output), 'errors': str(errors), 'devices': devices}
    request |= {'limit': limit, 'kill': kill, 'after': after or {}}
    self._process.stdin.write(json.dumps(request).encode() + b'\n')
    self._run = self._answer()
    return self._run

  def wait(self) -> int:
    """Exit code of the run that was started last; one that takes too long is killed."""
    if not select.select([self._process.stdout], [], [], LONGEST)[0]:
      os.kill(self._run, signal.SIGKILL)
      raise TimeoutError(f'a run took more than {LONGEST} s')
    return self._answer()

  def _answer(self) -> int:
    return int(self._process.stdout.readline())

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


_SHARED: list[Forks] = []


def shared(number: int = 0) -> Forks:
  """The first or second of such processes; they live as long as this one, and every test may ask them."""
  assert number < 2, 'two processes of one run are the most that a test starts'
  while len(_SHARED) <= number:
    _SHARED.append(Forks())
  return _SHARED[number]


def main(argv: list[str]) -> subprocess.CompletedProcess[str]:
  """Runs main.py with `argv` to its end, as `subprocess.run` does."""
  with tempfile.TemporaryDirectory() as directory:
    output, errors = (pathlib.Path(directory, name) for name in ('output', 'errors'))
    shared().start(argv, output, errors)
    code = shared().wait()
    return subprocess.CompletedProcess(argv, code, output.read_text(), errors.read_text())
