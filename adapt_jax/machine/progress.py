"""Progress of long work: a bar on a terminal, plain lines elsewhere, which move while the work is silent."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from adapt_jax.machine.processes import OutputClosed, shows, write

_TICK_SECONDS, _LINE_SECONDS = 1.0, 10.0
_FEW = 10  # units; of fewer, the time that is left cannot be told: one may take longer than all before
_SCALED = ('tokens', 'removed')  # the last words of counts that are shown as 3.4M
_active: list['Progress'] = []


class Progress:
  """A context manager that counts `unit`s of `total` work and shows rate and time left.

  On a terminal this is a tqdm bar, drawn anew every second; elsewhere one line every ten seconds, and for
  the first and the last update. `total` None: how much there is to do is not known, and the last line says
  how much it was. Without a unit nothing is counted, and only work that takes ten seconds has lines. Of
  several processes the first shows it.
  """

  def __init__(self, title: str, total: int | None, unit: str = ''):
    self._title, self._total, self._unit, self._done = _prefix() + title, total, unit, 0
    self._start = time.monotonic()
    self._shown = self._start - (0 if total is None else _LINE_SECONDS)  # when the last line was
    self._values, self._phase, self._phase_start = '', '', 0.0
    self._paused: float | None = None  # when the time stopped that rates count
    self._bar: Any = None
    self._lock, self._ended = threading.Lock(), threading.Event()

  def __enter__(self) -> 'Progress':
    _active.append(self)
    if not shows():
      return self
    if sys.stderr.isatty():
      layout = None if self._unit else '{desc}: {elapsed}{postfix}'
      self._bar = tqdm(
        total=self._total, desc=self._title, unit=f' {self._unit}', unit_scale=self._unit.endswith(_SCALED),
        bar_format=layout, dynamic_ncols=True, leave=bool(self._unit), file=sys.stderr,
      )  # fmt: skip
    if self._bar is not None and self._bar.disable:  # as TQDM_DISABLE asks
      self._bar = None
      return self
    threading.Thread(target=self._tick, daemon=True).start()
    return self

  def __exit__(self, kind: Any, *exc: object) -> None:
    self._ended.set()
    _active.remove(self)
    with self._lock:
      if self._bar is not None:
        if kind is None and self._total is not None and self._bar.n != self._total:
          self._bar.total = self._bar.n  # the work had less than was expected, and is done
        self._bar.close()
      elif kind is None and self._total is None and self._done:
        self._line()

  def update(self, amount: int, **values: str) -> None:
    """Adds `amount` units; `values` are shown beside."""
    if not shows():
      return
    with self._lock:
      self._done += amount
      self._values = ' '.join(f'{k} {v}' for k, v in values.items())
      if self._bar is not None:
        self._bar.set_postfix_str(self._values, refresh=False)
        self._bar.update(amount)
        return
      due = time.monotonic() - self._shown >= _LINE_SECONDS
      if due or (self._total is not None and self._done >= self._total):
        self._line()

  @contextlib.contextmanager
  def phase(self, name: str, *, counts: bool) -> Iterator[None]:
    """Names what is going on inside; its time is kept out of rates, if there are any, unless it `counts`."""
    start = time.monotonic()
    before = self._phase, self._phase_start
    pauses = bool(self._unit) and not counts and self._paused is None  # else an outer phase pauses already
    with self._lock:
      self._phase, self._phase_start = name, start
      if pauses:
        self._paused = start
    self._show_phase()
    try:
      yield
    finally:
      with self._lock:
        self._phase, self._phase_start = before
        if pauses:
          seconds, self._paused = time.monotonic() - start, None
          self._start += seconds
          if self._bar is not None:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds
      self._show_phase()

  def _show_phase(self) -> None:
    with self._lock:
      if self._bar is not None:
        self._bar.set_postfix_str(self._phase or self._values, refresh=True)

  def _tick(self) -> None:
    while not self._ended.wait(_TICK_SECONDS):
      with self._lock:
        if self._ended.is_set():
          return
        if self._bar is not None:
          self._bar.refresh()
        elif time.monotonic() - self._shown >= _LINE_SECONDS:
          try:
            self._line()
          except (OSError, OutputClosed):  # nobody reads any more: the main thread finds out by itself
            return

  def _line(self) -> None:
    """One plain line: how far, how fast, how long."""
    now = self._shown = time.monotonic()
    seconds = max((now if self._paused is None else self._paused) - self._start, 1e-9)
    parts = [f'{self._title}:']
    if self._unit:
      total = '' if self._total is None else f'/{self._total:,}'
      parts.append(f'{self._done:,}{total} {self._unit}')
      if self._done:
        parts.append(f'{self._done / seconds:,.1f}/s')
      if self._done and self._total is not None and self._total >= _FEW:
        parts.append(f'{max(self._total - self._done, 0) * seconds / self._done:.0f} s left')
    else:
      parts.append(f'{seconds:.0f} s')
    parts.append(self._phase or self._values)
    if self._unit and self._phase:
      parts.append(f'for {now - self._phase_start:.0f} s')
    write(' '.join(filter(None, parts)))


@contextlib.contextmanager
def phase(name: str, *, counts: bool = False) -> Iterator[None]:
  """Names what happens inside, such as compiling, on the line of the work that waits for it, or alone."""
  if _active:
    with _active[-1].phase(name, counts=counts):
      yield
  else:
    with Progress(name, None):
      yield


_prefixes: list[str] = []


@contextlib.contextmanager
def prefixed(prefix: str) -> Iterator[None]:
  """Inside, titles begin with this, as with the number of a grid's cell."""
  _prefixes.append(prefix)
  try:
    yield
  finally:
    _prefixes.pop()


def _prefix() -> str:
  return ''.join(f'{prefix}: ' for prefix in _prefixes)
