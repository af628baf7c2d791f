"""Progress of long work by tqdm: a line that moves on a terminal; elsewhere one in ten seconds and at last.

A line that would repeat the last one, except for its times, comes only after thirty. The values stand before
the times, since terminals are narrow. The last line says how long the work took.

A thread draws it again while the work is silent, as in one long call.
"""

import contextlib
import io
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from adapt_jax.machine.processes import OutputClosed, shows, write

_TICK_SECONDS, _LINE_SECONDS, _SAME_SECONDS = 1.0, 10.0, 30.0
_SCALED = ('tokens', 'removed')  # the last words of counts that are shown as 3.4M
_active: list['Progress'] = []


class Progress:
  """A context manager that counts `unit`s of `total` work and shows the time left, and the rate of tokens.

  total: None if it is not known. Without a unit nothing is counted, and the bar leaves no line when it ends.
  Of several processes the first shows it.
  """

  def __init__(self, title: str, total: int | None, unit: str = ''):
    self._unit, self._values = unit, ''
    self._bar: Any = None
    self._terminal, self._ended = sys.stderr.isatty(), threading.Event()
    known, left = ('', '') if total is None else ('/{total_fmt}', ', {remaining} left')
    line = f'{{desc}}: {{n_fmt}}{known}{{unit}}{{postfix}}, {{elapsed}}'
    rate = ', {rate_fmt}' if unit == 'tokens' else ''  # of others it says no more than the time left
    self._counting = f'{line}{left}{rate}'  # before anything is counted, neither is known
    self._look: dict[str, Any] = {'desc': title, 'total': total, 'unit': f' {unit}', 'leave': bool(unit)}
    self._look |= {'unit_scale': unit.endswith(_SCALED), 'dynamic_ncols': True, 'file': sys.stderr}
    self._look['bar_format'] = line if unit else '{desc}: {elapsed}{postfix}'
    if not self._terminal:  # never drawn, only read: and TQDM_DISABLE is for bars
      self._look |= {'file': io.StringIO(), 'mininterval': math.inf, 'disable': False}

  def __enter__(self) -> 'Progress':
    _active.append(self)
    if shows():
      self._bar = tqdm(**self._look)
      threading.Thread(target=self._tick, args=(self._bar,), daemon=True).start()
    return self

  def __exit__(self, kind: Any, *exc: object) -> None:
    _active.remove(self)
    self._ended.set()
    if self._bar is None:
      return
    if kind is None and self._unit:
      self._bar.bar_format = '{desc}: {n_fmt}{unit}{postfix}, in {elapsed}'
      if not self._terminal:
        write(str(self._bar))
    self._bar.close()

  def update(self, amount: int, **values: str) -> None:
    """Adds `amount` units; `values` are shown beside."""
    self._values = ' '.join(f'{k} {v}' for k, v in values.items())
    if self._bar is not None:
      self._bar.bar_format = self._counting
      self._bar.set_postfix_str(self._values, refresh=False)
      self._bar.update(amount)

  def show(self, phase: str) -> None:
    """Shows what is going on in place of the values; '' shows the values again."""
    if self._bar is not None:
      self._bar.set_postfix_str(phase or self._values, refresh=True)

  def _tick(self, bar: Any) -> None:
    shown, said = time.monotonic(), None
    while not self._ended.wait(_TICK_SECONDS):
      now = bar.n, bar.postfix
      if self._terminal:
        bar.refresh()
      elif time.monotonic() - shown >= (_SAME_SECONDS if now == said else _LINE_SECONDS):
        shown, said = time.monotonic(), now
        try:
          write(str(bar))
        except (OSError, OutputClosed):  # nobody reads any more: the main thread finds out by itself
          return


@contextlib.contextmanager
def phase(name: str, total: int = 0) -> Iterator[Callable[[int], None]]:
  """Names what happens inside, such as compiling, on the line of the work that waits for it, or alone.

  It yields a function to be told how much more of `total` is done, which shows the share and the time left.
  """
  start, first, done, alone = 0.0, 0, 0, not _active
  with Progress(name, None) if alone else contextlib.nullcontext(_active[-1]) as line:

    def tick(amount: int) -> None:
      nonlocal start, first, done
      if not done:  # the time before may have been that of a compile
        start, first = time.monotonic(), amount
      done += amount
      share = f'{"" if alone else f"{name} "}{100 * done // total} %'
      seconds = (time.monotonic() - start) * (total - done) / max(done - first, 1)
      line.show(f'{share}, {tqdm.format_interval(seconds)} left' if done > first else share)

    line.show('' if alone else name)
    try:
      yield tick
    finally:
      line.show('')
