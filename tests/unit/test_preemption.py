"""SIGTERM while a program runs on the devices."""

import os
import signal
import threading
import time

import pytest

from adapt_jax.machine import preemption


class Busy:
  """An array that is not computed within the time of a test."""

  def is_ready(self):
    return False


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
def test_a_long_program_is_not_waited_for(sent, monkeypatch):
  monkeypatch.setattr(preemption, '_abandoned', False)
  monkeypatch.setattr(preemption, '_noted', '')  # undone at the end, for other tests
  timer = threading.Timer(0.2, os.kill, (os.getpid(), sent))
  with preemption.watched(), preemption.deferred():
    timer.start()
    start = time.monotonic()
    with pytest.raises(preemption.Preempted):
      preemption.ready([Busy()])
  assert preemption.abandoned() and time.monotonic() - start < 10
