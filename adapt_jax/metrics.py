"""The run's log, one JSON object a line: every pruning step, training step and evaluation."""

import json
import pathlib
from typing import Any

from models.files import write_text


class MetricsLog:
  """Appends to `metrics.jsonl`; a resumed run first cuts what came after its checkpoint."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.lines = len(path.read_text().splitlines()) if path.exists() else 0

  def write(self, event: str, **values: Any) -> None:
    """One line: {"event": event, ...}."""
    with open(self._path, 'a', encoding='utf-8') as file:
      file.write(json.dumps({'event': event} | values) + '\n')
    self.lines += 1

  def read(self) -> list[dict[str, Any]]:
    """All lines so far."""
    if not self._path.exists():
      return []
    return [json.loads(line) for line in self._path.read_text().splitlines()]

  def cut(self, lines: int) -> None:
    """Keeps the first `lines` lines."""
    if lines < self.lines:
      kept = self._path.read_text().splitlines(keepends=True)[:lines]
      write_text(self._path, ''.join(kept))
      self.lines = lines
