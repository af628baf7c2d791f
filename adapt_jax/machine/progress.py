"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from adapt_jax.machine.processes import shows

_LINE_SECONDS = 10.0


class Progress:
  """A context manager that counts `unit`s of `total` work and shows rate and time left.

  On a terminal this is a tqdm bar; elsewhere one line every ten seconds, the first and the last
  update always. Of several processes the first shows it.
  """

  def __init__(self, title: str, total: int, unit: str):
    self._title, self._total, self._unit, self._done = title, total, unit, 0
    self._start, self._shown = time.monotonic(), -_LINE_SECONDS
    self._bar: Any = None
    self._silent = not shows()
    if sys.stderr.isatty() and not self._silent:
      self._bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True)

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc: object) -> None:
    if self._bar is not None:
      self._bar.close()

  def update(self, amount: int, **values: str) -> None:
    """Adds `amount` units; `values` are shown beside."""
    self._done += amount
    if self._bar is not None:
      self._bar.set_postfix(values, refresh=False)
      self._bar.update(amount)
      return
    now = time.monotonic()
    if self._silent or (now - self._shown < _LINE_SECONDS and self._done < self._total):
      return
    self._shown = now
    rate = self._done / max(now - self._start, 1e-9)
    left = max(self._total - self._done, 0) / max(rate, 1e-9)
    shown = ' '.join(f'{k} {v}' for k, v in values.items())
    print(
      f'{self._title}: {self._done:,}/{self._total:,} {self._unit} {rate:,.1f}/s {left:.0f} s left {shown}',
      flush=True,
    )
