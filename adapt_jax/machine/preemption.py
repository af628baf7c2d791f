"""SIGTERM and Ctrl-C end a run at a point from which it can be resumed.

SIGTERM raises `Preempted` at once, since a run can be killed safely; where work would be lost (`deferred`),
it is recorded, and the next check point raises. With several processes, JAX's own preemption service handles
SIGTERM sent to any process, and all stop at the same check point. In a single process a long program on the
devices is left to itself (`ready`), Ctrl-C (SIGINT) acts like SIGTERM, and a second Ctrl-C ends the run at
once.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

_noted = ''  # the signal received
_points = 0  # check points so far
_deferring = False
_abandoned = False
_POLL_SECONDS = 0.05


class Preempted(BaseException):
  """A signal ends the run; the message may say where. Like KeyboardInterrupt, it is not an Exception."""


def requested() -> bool:
  """Whether SIGTERM was received. With several processes, all must call it as often, in the same order."""
  if jax.process_count() == 1:
    return bool(_noted)
  global _points
  _points += 1
  return multihost_utils.reached_preemption_sync_point(_points)


def check() -> None:
  """A check point: raises `Preempted` if SIGTERM was received."""
  if requested():
    raise Preempted


def ready(arrays: Any) -> Any:
  """The arrays of a program that may take minutes, when it has computed them.

  In a single process it raises `Preempted` soon after SIGTERM: Python runs no signal handler while it waits
  inside JAX. The program goes on, and is given up when the process ends (`abandoned`).
  """
  global _abandoned
  if jax.process_count() == 1:
    try:
      pause = _POLL_SECONDS / 64  # as long as it has waited, at most: some programs take milliseconds
      for array in jax.tree.leaves(arrays):
        while not array.is_ready():
          check()
          time.sleep(pause)
          pause = min(2 * pause, _POLL_SECONDS)
    except Preempted:
      _abandoned = True
      raise
  return jax.block_until_ready(arrays)


def abandoned() -> bool:
  """Whether a program may still run, for which an orderly end of the process would wait."""
  return _abandoned


def cause() -> str:
  """The name of the signal that ended the run, for the user."""
  return _noted or 'SIGTERM'


def _on_signal(number: int, _: Any) -> None:
  global _noted
  again, _noted = _noted, 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'
  if again and number == signal.SIGINT:
    raise KeyboardInterrupt
  if not _deferring and not again:
    raise Preempted
  if number == signal.SIGINT:
    os.write(2, b'\nstopping after the work is saved; press Ctrl-C again to stop at once\n')


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Handles SIGTERM and Ctrl-C inside the block; for the main thread."""
  global _noted
  _noted = ''
  if jax.process_count() > 1:
    yield
    return
  numbers = [signal.SIGTERM]
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs ignore it
    numbers.append(signal.SIGINT)
  before = {number: signal.signal(number, _on_signal) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """Inside the block, SIGTERM takes effect at the next check point."""
  global _deferring
  before, _deferring = _deferring, True
  try:
    yield
  finally:
    _deferring = before
