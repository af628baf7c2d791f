"""A process that has imported `main.py` and forks a run for each line on stdin: a start without its imports.

A line is the JSON of `run`'s arguments. Answers, a line each: the run's pid; its exit code.
"""

import functools
import gc
import json
import os
import pathlib
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import matplotlib.backends.backend_svg
import matplotlib.figure  # noqa: F401  main.py imports it late
from jax._src import compiler, distributed
from transformers import AutoTokenizer  # noqa: F401  with torch, where it is: main.py imports them late

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from adapt_jax import cli  # noqa: E402
from adapt_jax.pipeline import gain  # noqa: E402
from adapt_jax.pipeline.metrics import MetricsLog  # noqa: E402
from tests.support import programs  # noqa: E402


def run(
  argv: list[str], output: str, errors: str, devices: int, limit: int | None, kill: str, after: dict[str, Any]
) -> None:
  """main.py with `argv`; what it prints goes to the file `output`, and with `errors` its stderr to that one.

  limit: bytes that a file may have. kill: a signal, or '': it comes after the log's line with the fields
  `after`, or as soon as the log is opened.
  """
  for number, name in ((1, output), (2, errors)):
    if name:
      os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  if not errors:
    os.dup2(1, 2)
  if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  if kill:
    _send(signal.Signals[kill], after)
  signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background would ignore
  jax.config.update('jax_num_cpu_devices', devices)
  programs.write_whole()
  programs.lower_in_one_context()
  compiler._cache_write = functools.partial(_write_as_first, compiler._cache_write)
  gain._LARGEST = 0  # a run measures no speeds: no test of a command needs them
  sys.argv = argv
  cli.run()


def _write_as_first(write: Callable[..., None], *arguments: Any) -> None:
  """JAX keeps the programs of the first process alone, and for CPUs those of another have other keys."""
  with mock.patch.object(distributed.global_state, 'process_id', 0):
    write(*arguments)


def _send(number: signal.Signals, after: dict[str, Any]) -> None:
  opened, write = MetricsLog.__init__, MetricsLog.write

  def open_log(self: MetricsLog, path: pathlib.Path) -> None:
    opened(self, path)
    if not after:
      os.kill(os.getpid(), number)

  def write_line(self: MetricsLog, event: str, **values: Any) -> None:
    write(self, event, **values)
    if after and after.items() <= ({'event': event} | values).items():
      os.kill(os.getpid(), number)

  MetricsLog.__init__, MetricsLog.write = open_log, write_line  # type: ignore[method-assign]


gc.freeze()  # runs need not look through the imports for garbage, and do not copy their pages
for line in sys.stdin:
  pid = os.fork()
  if pid == 0:
    run(**json.loads(line))
    sys.exit(0)
  print(pid, flush=True)
  print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
