"""SIGTERM: a machine that is taken away warns so. The run ends where it can be taken up again.

SIGTERM raises `Preempted` at once, for no kill does harm; but where work would be lost (`deferred`) it is
noted, and the next check point raises. Of several processes JAX's own preemption service takes the signal, of
whichever process, and all stop at the same check point.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

_noted = False
_points = 0  # check points so far
_deferring = False


class Preempted(BaseException):
  """SIGTERM ends the run; the message may tell where. Like KeyboardInterrupt not for `except Exception`."""


def requested() -> bool:
  """Whether SIGTERM has come. Of several processes all must call it as often, in the same order."""
  if jax.process_count() == 1:
    return _noted
  global _points
  _points += 1
  return multihost_utils.reached_preemption_sync_point(_points)


def check() -> None:
  """A check point: raises `Preempted` if SIGTERM has come."""
  if requested():
    raise Preempted


def _on_signal(*_: Any) -> None:
  global _noted
  again, _noted = _noted, True
  if not _deferring and not again:
    raise Preempted


@contextlib.contextmanager
def watched() -> Iterator[None]:
  """Handles SIGTERM inside; in the main thread."""
  global _noted
  _noted = False
  if jax.process_count() > 1:
    yield
    return
  before = signal.signal(signal.SIGTERM, _on_signal)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
  """Inside, SIGTERM waits for the next check point."""
  global _deferring
  before, _deferring = _deferring, True
  try:
    yield
  finally:
    _deferring = before
