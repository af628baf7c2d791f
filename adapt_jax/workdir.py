"""The directory of one run: what lies where, and whose it is."""

import json
import pathlib
import tempfile
from typing import Any

from models.errors import InputError
from models.files import write_text


class Workdir:
  """Paths of a run's files, and the run that they belong to.

  Args:
    path: of the directory; created by `claim`.
    identity: what makes two runs the same, as JSON: mode and config.
  """

  def __init__(self, path: str, identity: dict[str, Any]):
    if not path:
      raise InputError('--workdir is empty: name a directory for the results')
    self.path, self._identity = pathlib.Path(path), identity
    self.run = self.path / 'run.json'
    self.report = self.path / 'report.json'
    self.page = self.path / 'report.html'
    self.plan = self.path / 'plan.json'
    self.metrics = self.path / 'metrics.jsonl'
    self.checkpoints = self.path / 'checkpoints'
    self.hf = self.path / 'hf'

  def check(self) -> None:
    """Raises InputError if the directory cannot be written or belongs to another run; writes nothing."""
    where = f'--workdir={self.path}'
    if self.path.exists() and not self.path.is_dir():
      raise InputError(f'{where} is a file: name a directory')
    existing = self.path
    while not existing.exists():
      existing = existing.parent
    try:
      with tempfile.TemporaryFile(dir=existing):
        pass
    except OSError as error:
      raise InputError(f'{where} is not writable ({error.strerror}): choose another') from None
    if self.run.exists():
      self._check_same()
    elif self.path.exists() and any(self.path.iterdir()):
      raise InputError(f'{where} holds files of something else: name a new or empty directory')

  def claim(self) -> None:
    """Marks the directory as this run's; the same run may claim it again, to resume."""
    self.path.mkdir(parents=True, exist_ok=True)
    if not self.run.exists():
      write_text(self.run, json.dumps(self._identity, indent=2) + '\n')

  def _check_same(self) -> None:
    before = _flatten(json.loads(self.run.read_text()))
    now = _flatten(json.loads(json.dumps(self._identity)))
    for field in sorted(before.keys() | now.keys()):
      if before.get(field) != now.get(field):
        raise InputError(
          f'--workdir={self.path} belongs to a run with {field} = {before.get(field)!r}, not '
          f'{now.get(field)!r}: use another workdir, or the same config to resume'
        )


def _flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix: tree}
  out: dict[str, Any] = {}
  for key, value in tree.items():
    out |= _flatten(value, f'{prefix}.{key}' if prefix else key)
  return out
