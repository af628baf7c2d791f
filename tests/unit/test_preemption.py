"""SIGTERM while a program runs on the devices."""

import os
import signal
import threading
import time

import pytest

from adapt_jax.machine import preemption


class Busy:
  """An array that is computed after ten seconds."""

  def __init__(self):
    self.end = time.monotonic() + 10

  def is_ready(self):
    return time.monotonic() > self.end


@pytest.mark.parametrize('sent', [signal.SIGTERM, signal.SIGINT])
def test_a_long_program_is_not_waited_for(sent, monkeypatch):
  monkeypatch.setattr(preemption, '_abandoned', False)
  monkeypatch.setattr(preemption, '_noted', '')  # undone at the end, for other tests
  timer = threading.Timer(0.2, os.kill, (os.getpid(), sent))
  before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
  try:
    with preemption.watched(), preemption.deferred():
      timer.start()
      with pytest.raises(preemption.Preempted):
        preemption.ready([Busy()])
  finally:
    signal.signal(signal.SIGINT, before)
  assert preemption.abandoned()
