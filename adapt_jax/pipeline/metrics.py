"""The run's log, one JSON object per line: every pruning step, training step and evaluation."""

import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from adapt_jax.machine.processes import is_first
from adapt_jax.models.errors import reading
from adapt_jax.models.files import write_text
from adapt_jax.reports import trackers


class MetricsLog:
  """Appends to `metrics.jsonl`; a resumed run first removes the lines after its checkpoint.

  Only the first process writes. Trackers get each line too, from `track` on.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._trackers: list[trackers.Tracker] = []
    content = path.read_bytes() if path.exists() else b''
    lines = content.splitlines()
    self.lines = len(lines)
    # The machine may have crashed while it wrote the last line.
    whole = self.lines - (not content.endswith(b'\n'))
    for number, line in enumerate(lines[: max(whole, 0)], 1):
      with reading(
        f'line {number} of', path, 'repair it, or move the file away to resume without its curves'
      ):
        _ = json.loads(line)['event']
    if content:
      self.cut(whole)

  def write(self, event: str, **values: Any) -> None:
    """One line: {"event": event, "time": "2026-01-31T12:00:00+00:00", ...}."""
    if not is_first():
      return
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    row = {'event': event, 'time': now} | values
    with open(self._path, 'a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')
    self.lines += 1
    for tracker in self._trackers:
      tracker.write(row)

  def track(self, names: Sequence[str], settings: dict[str, Any]) -> None:
    """Starts these trackers with the lines so far; `settings`: the run's options, for them to show."""
    if is_first():
      self._trackers = trackers.start(names, self._path.parent, settings, self.read())

  def close(self) -> None:
    """Closes the trackers."""
    for tracker in self._trackers:
      tracker.close()
    self._trackers = []

  def read(self) -> list[dict[str, Any]]:
    """All lines so far."""
    if not self._path.exists():
      return []
    return [json.loads(line) for line in self._path.read_bytes().splitlines()]

  def cut(self, lines: int) -> None:
    """Keeps only the first `lines` lines; must be called before `track` and the first write."""
    if lines < self.lines and is_first():
      kept = self._path.read_bytes().splitlines(keepends=True)[:lines]
      write_text(self._path, b''.join(kept).decode())
      self.lines = lines
