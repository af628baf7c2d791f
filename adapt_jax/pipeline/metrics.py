"""The run's log, one JSON object per line: every pruning step, training step and evaluation."""

import datetime
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from adapt_jax.config.values import TEXT
from adapt_jax.machine.processes import is_first
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import regular, write_text
from adapt_jax.reports import trackers

# Fields that each line of an event has, and those of a pruning step with a number for each layer.
_NUMBERS = {
  'prune': ('stage', 'step', 'params', 'loss'),
  'train': ('stage', 'step', 'loss', 'learning_rate', 'gradient_norm', 'tokens_per_second'),
  'evaluate': ('step', 'perplexity'),
}
_OF_LAYERS = ('layer_importance', 'sparsity', 'kv_groups', 'ffn')
_OF_LAYERS_NOW = ('query_heads',)  # that earlier versions did not write


class MetricsLog:
  """Appends to `metrics.jsonl`; a resumed run first removes the lines after its checkpoint.

  Only the first process writes. Trackers get each line too, from `track` on.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._trackers: list[trackers.Tracker] = []
    content = regular(path).read_bytes() if path.exists() else b''
    lines = content.splitlines()
    self.lines = len(lines)
    # The machine may have crashed while it wrote the last line.
    whole = self.lines - (not content.endswith(b'\n'))
    for number, line in enumerate(lines[: max(whole, 0)], 1):
      _check(line, f'{path}: line {number}')
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


def _check(line: bytes, where: str) -> None:
  """Raises InputError, before a resumed run computes anything, for a line that no run has written."""
  try:
    good = _drawable(json.loads(line))
  except (RecursionError, ValueError):
    good = False
  if not good:
    raise InputError(f'{where} is damaged: repair it, or move the file away to resume without its curves')


def _drawable(row: Any) -> bool:
  """Whether a value of JSON is a line of the log with all that curves and pages are drawn from."""
  if not isinstance(row, dict) or not isinstance(event := row.get('event'), str):
    return False
  numbers = [row.get('stage', 0), *(row.get(name) for name in _NUMBERS.get(event, ()))]
  of_layers: list[Any] = []
  if event == 'prune':
    of_layers = [row.get(name) for name in _OF_LAYERS] + [row[name] for name in _OF_LAYERS_NOW if name in row]
  names = [row.get('of'), row.get('text', TEXT)] if event == 'evaluate' else []
  if not all(isinstance(found, list) for found in of_layers) or len(set(map(len, of_layers))) > 1:
    return False
  numbers += [value for found in of_layers for value in found]
  return all(isinstance(name, str) for name in names) and all(map(_is_number, numbers))


def _is_number(found: Any) -> bool:
  return type(found) is float or (type(found) is int and abs(found) < 2**63)
