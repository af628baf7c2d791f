"""The directory of one run: the paths of its files, the run that owns it, and the process that uses it."""

import contextlib
import errno
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import filelock

from adapt_jax.config.build import defaults, flatten
from adapt_jax.config.identity import RUNS
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import beside, exists, local, read_json, write_text

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_DAMAGED = 'use another workdir'
_RUN = 'run.json'


def begun_with(path: str, field: str) -> Any:
  """The value of an option of the run in the directory; None if there is no run, or no such option."""
  run = local(path) / _RUN
  if not path or not exists(run):
    return None
  with reading('', run, _DAMAGED):
    return flatten({**read_json(run, _DAMAGED)['config']}).get(field)


class Workdir:
  """Paths of a run's files, and the run that they belong to.

  The process that claims the directory locks `.lock` in it. The lock ends with the process, however it ends;
  on NFS it also holds between machines.

  Args:
    path: path of the directory; created by `claimed`.
    identity: equal for equal runs (`adapt_jax.config.identity`).
  """

  def __init__(self, path: str, identity: dict[str, Any]):
    if not path:
      raise InputError('--workdir is empty: name a directory for the results')
    self.path, self._identity = local(path), identity
    self.run = self.path / _RUN
    self.report = self.path / 'report.json'
    self.page = self.path / 'report.html'
    self.plan = self.path / 'plan.json'
    self.metrics = self.path / 'metrics.jsonl'
    self.checkpoints = self.path / 'checkpoints'
    self.hf = self.path / 'hf'
    self.teacher = self.path / 'teacher'
    self._lock_file = self.path / '.lock'

  def check(self) -> None:
    """Raises InputError if the directory cannot be written, is in use or belongs to another run."""
    with self._reading():
      places = (self.path, *self.path.parents)
      existing = next(place for place in places if place.exists() or place.is_symlink())
      with tempfile.TemporaryFile(dir=existing):
        pass
      files = {*self.path.iterdir()} if self.path.exists() else set()
    if self.run in files:
      self._check_same()
      self._lock().release()
    elif files - {self._lock_file, beside(self.run)}:  # both are left by a kill while claiming
      raise InputError(f'--workdir={self.path} contains other files: name a new or empty directory')

  def _reading(self) -> contextlib.AbstractContextManager[None]:
    return reading(f'--workdir={self.path}', remedy='name another directory')

  @contextlib.contextmanager
  def claimed(self, texts: Callable[[], dict[str, str]] = dict) -> Iterator[None]:
    """Marks the directory as this run's, and locks it inside the block; the same run may claim it again.

    texts: returns a digest of each text, and of the model, that a resume depends on, by option. All processes
    of a run must enter it. Raises InputError if another process uses the directory, or if a text or the
    model has changed since the run was started.
    """
    with contextlib.ExitStack() as held:

      def claim() -> None:
        now = texts()
        with self._reading():
          self.path.mkdir(parents=True, exist_ok=True)
          held.callback(self._lock().release)
          self._claim(now)

      decide(claim)
      yield

  def texts(self) -> dict[str, str]:
    """The digests of texts and model, by option, that the run in the directory was started with."""
    with reading('', self.run, _DAMAGED):
      return {**read_json(self.run, _DAMAGED).get('texts', {})}

  def _claim(self, now: dict[str, str]) -> None:
    """Writes run.json if it is missing, or checks that it is this run's, on the same texts."""
    if not self.run.exists():
      content = self._identity | ({'texts': now} if now else {})
      write_text(self.run, json.dumps(content, indent=2) + '\n')
      return
    self._check_same()  # another run may have claimed the directory since `check`
    then = self.texts()
    for field, digest in now.items():
      if then.get(field, digest) != digest:
        raise InputError(
          f'{field} is not what the run in --workdir={self.path} was started with: restore '
          f'it, or use another workdir'
        )

  def _lock(self) -> filelock.BaseFileLock:
    """The lock of the directory, acquired. Raises InputError if another process has it."""
    lock = filelock.FileLock(self._lock_file, blocking=False, fallback_to_soft=False)
    try:
      lock.acquire()
    except filelock.Timeout:
      raise InputError(
        f'--workdir={self.path} is in use by another process: wait until it ends, or name another directory'
      ) from None
    except OSError as error:
      if error.errno in _DENIED:
        raise
      say(
        f'{self._lock_file}: the file system refuses a lock ({error}): start no second run in this directory'
      )
    return lock

  def _check_same(self) -> None:
    with reading('', self.run, _DAMAGED):
      saved = read_json(self.run, _DAMAGED)
      then = {'mode': saved['mode']} | flatten(saved['config'])
    now = {'mode': self._identity['mode']} | flatten(self._identity['config'])
    default = flatten(json.loads(json.dumps(defaults())))  # with lists, as in run.json
    remedy = 'use another workdir, or the same config to resume'
    if then['mode'] in RUNS and now['mode'] == 'export':
      remedy = f'write the export into another workdir, with --config.model.source={self.path}'
    for name in then | now:  # options added since the run was started have their defaults
      was, value = (of.get(name, default.get(name)) for of in (then, now))
      if was != value:
        raise InputError(
          f'--workdir={self.path} belongs to a run with {name} = {was!r}, not {value!r}: {remedy}'
        )
