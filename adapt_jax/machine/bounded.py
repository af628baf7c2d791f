"""Runs code of others, such as chat templates, in a forked process with little time and memory.

Nothing inside Python stops a single product such as 'a' * 3_000_000_000, or a loop in another thread; the
system ends a process. A fork has all objects of this one and starts in milliseconds.
"""

import gc
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from adapt_jax.models.errors import InputError

SECONDS = 10  # of computing for one call, or between two calls of `restart`
_WAITING = 30  # times as long by the clock, on a machine that computes other things
MEMORY = 2**30  # bytes, in addition to what this process has
_RESULT = 2**26  # bytes of one result
_MOST_FILES = 2**16  # where the system does not list those that are open
LIMITS = f'{SECONDS} s of computing or {MEMORY >> 30} GiB of memory'
_Item = TypeVar('_Item')
_inside = False


class Overrun(InputError):
  """A call needed too much time or memory, or ended its process; `index` is that of its item."""

  def __init__(self, index: int):
    super().__init__(f'more than {LIMITS}')
    self.index = index


def each(call: Callable[[_Item], Any], items: Sequence[_Item]) -> list[Any]:
  """`call(item)`, a JSON value, for each item, computed in one forked process. Raises Overrun.

  `call` should raise nothing, and must use no device, thread or open file.
  """
  read, write = os.pipe()
  try:
    with _signals_blocked(), _quietly():
      pid = os.fork()
      if pid == 0:
        _serve(call, items, write)
  except OSError as error:
    os.close(read)
    raise InputError(f'no process can be started for a chat template ({error.strerror})') from None
  finally:
    os.close(write)
  try:
    with open(read, 'rb') as answers:
      found = [json.loads(line) for line in answers if line.endswith(b'\n')]
  finally:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
  if len(found) < len(items):
    raise Overrun(len(found))
  return found


def restart() -> None:
  """Begins the time of a call anew, for calls of several parts; does nothing outside `each`."""
  if _inside:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS * _WAITING)


@contextmanager
def _signals_blocked() -> Iterator[None]:
  """The fork keeps SIGTERM and Ctrl-C blocked, which are for the run: it decides and ends the fork."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _quietly() -> Iterator[None]:
  """Forks without the warnings of Python, JAX and tokenizers, which are for forks that compute."""
  unset = 'TOKENIZERS_PARALLELISM' not in os.environ
  if unset:
    os.environ['TOKENIZERS_PARALLELISM'] = 'true'  # its default
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      yield
  finally:
    if unset:
      os.environ.pop('TOKENIZERS_PARALLELISM', None)


def _serve(call: Callable[[_Item], Any], items: Sequence[_Item], write: int) -> NoReturn:
  """Writes a line with the JSON of each result, and ends without any of Python's work at an exit."""
  global _inside
  try:
    gc.disable()  # no destructor of the other process's objects
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGPIPE):
      signal.signal(number, signal.SIG_DFL)
    # Not the locks of files, which end with the last process that has them open.
    _close_all_but(write)
    _limit_memory()
    _inside = True
    for item in items:
      restart()
      line = json.dumps(call(item)).encode() + b'\n'
      if len(line) > _RESULT:
        break
      while line:
        line = line[os.write(write, line) :]
  except BaseException:  # whatever the code raises, even out of memory: the missing line tells it
    os._exit(1)
  os._exit(0)


def _close_all_but(kept: int) -> None:
  try:
    opened = [int(name) for name in os.listdir('/dev/fd')]  # one of them is that of the list
  except OSError:
    opened = list(range(_MOST_FILES))
  for descriptor in opened:
    if descriptor > 2 and descriptor != kept:
      with suppress(OSError):
        os.close(descriptor)


def _limit_memory() -> None:
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    with open('/proc/self/statm', 'rb') as file:
      pages = int(file.read().split()[0])
  except OSError:  # not on Linux: only the time is limited
    return
  most = resource.getrlimit(resource.RLIMIT_AS)[1]
  wanted = pages * os.sysconf('SC_PAGE_SIZE') + MEMORY
  if most == resource.RLIM_INFINITY or wanted < most:
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))
