"""The directory of one run: the paths of its files, and the run that owns it."""

import json
import pathlib
import tempfile
from typing import Any

from adapt_jax.config.build import defaults, flatten
from adapt_jax.machine.processes import is_first
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import write_text


class Workdir:
  """Paths of a run's files, and the run that they belong to.

  Args:
    path: path of the directory; created by `claim`.
    identity: equal for equal runs (`adapt_jax.config.identity`).
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
    self.teacher = self.path / 'teacher'
    self._claiming = self.path / '.run.json.tmp'  # left by a kill while claiming

  def check(self) -> None:
    """Raises InputError if the directory cannot be written or belongs to another run; writes nothing."""
    where = f'--workdir={self.path}'
    try:
      self._check_writable(where)
      ours = self.run.exists()
      foreign = not ours and self.path.exists() and any(p != self._claiming for p in self.path.iterdir())
    except OSError as error:
      raise InputError(f'{where} is not writable ({error.strerror}): choose another') from None
    if ours:
      self._check_same()
    elif foreign:
      raise InputError(f'{where} contains other files: name a new or empty directory')

  def _check_writable(self, where: str) -> None:
    existing = self.path
    while not existing.exists() and not existing.is_symlink():
      existing = existing.parent
    if not existing.is_dir():
      raise InputError(f'{where}: {existing} is a file or a broken link: name a directory')
    with tempfile.TemporaryFile(dir=existing):
      pass

  def claim(self) -> None:
    """Marks the directory as this run's; the same run may claim it again, to resume."""
    if not is_first():
      return
    self.path.mkdir(parents=True, exist_ok=True)
    if not self.run.exists():
      write_text(self.run, json.dumps(self._identity, indent=2) + '\n')

  def _check_same(self) -> None:
    try:
      saved = json.loads(self.run.read_text())
      mode, before = saved['mode'], flatten(saved['config'])
    except (ValueError, KeyError, TypeError, AttributeError):
      raise InputError(f'{self.run} is damaged: use another workdir') from None
    known = flatten(defaults())
    if unknown := sorted(before.keys() - known.keys()):
      raise InputError(
        f'--workdir={self.path} belongs to a run of another version, which has config.{unknown[0]}: use '
        f'another workdir, or that version to resume'
      )
    # Options added after the run was started have their default values, and are compared last. Options that
    # the mode does not read are ignored; version 0.1 wrote them too.
    now = {'mode': self._identity['mode']}
    now |= {f'config.{field}': value for field, value in flatten(self._identity['config']).items()}
    if mode in ('accel', 'prune') and self._identity['mode'] == 'export':
      raise InputError(
        f'--workdir={self.path} is the workdir of the run: write the export into another one, with '
        f'--workdir={self.path}-export and --config.model.source={self.path}'
      )
    then = {'mode': mode} | {f'config.{field}': value for field, value in before.items()}
    youngest = {f'config.{field}': value for field, value in known.items()}
    for name in sorted(now, key=lambda name: name not in then):
      if (was := then.get(name, youngest.get(name))) != (value := now[name]):
        raise InputError(
          f'--workdir={self.path} belongs to a run with {name} = {was!r}, not {value!r}: use another '
          f'workdir, or the same config to resume'
        )
