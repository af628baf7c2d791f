"""Samples the peak of this process's anonymous memory (heap and stacks, not mapped files); also its time."""

import pathlib
import re
import threading
import time


def now() -> tuple[float, float]:
  """Wall clock and CPU time of this process, in seconds."""
  return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
  wall, cpu = now()
  return wall - start[0], cpu - start[1]


def anonymous_bytes() -> int:
  """Anonymous memory of this process; Linux only."""
  status = pathlib.Path('/proc/self/status').read_text(encoding='ascii')
  found = re.search(r'^RssAnon:\s+(\d+) kB', status, re.MULTILINE)
  assert found, 'this kernel does not tell RssAnon'
  return 1024 * int(found[1])


class Peak(threading.Thread):
  """Peak of anonymous memory beyond that at the start, sampled every 5 ms."""

  def __init__(self) -> None:
    super().__init__(daemon=True)
    self._before = self._peak = anonymous_bytes()
    self.start()

  def run(self) -> None:
    while True:
      self._peak = max(self._peak, anonymous_bytes())
      time.sleep(0.005)

  def bytes(self) -> int:
    return max(self._peak, anonymous_bytes()) - self._before
