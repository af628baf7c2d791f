"""The directory of one run: the paths of its files, the run that owns it, and the process that uses it."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from adapt_jax.config.build import defaults, flatten
from adapt_jax.machine.processes import decide
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import local, read_json, read_text


class Workdir:
  """Paths of a run's files, and the run that they belong to.

  The process that claims the directory locks `run.json`. The lock ends with the process, however it ends; on
  NFS it also holds between machines.

  Args:
    path: path of the directory; created by `claim`.
    identity: equal for equal runs (`adapt_jax.config.identity`).
  """

  def __init__(self, path: str, identity: dict[str, Any]):
    if not path:
      raise InputError('--workdir is empty: name a directory for the results')
    self.path, self._identity = local(path), identity
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
    """Raises InputError if the directory cannot be written, is in use or belongs to another run.

    Writes nothing.
    """
    where = f'--workdir={self.path}'
    try:
      self._check_writable(where)
      ours = self.run.exists()
      foreign = not ours and self.path.exists() and any(p != self._claiming for p in self.path.iterdir())
    except OSError as error:
      raise InputError(f'{where} is not writable ({error.strerror}): choose another') from None
    if ours:
      self._check_same()
      os.close(self._lock(self.run))
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

  @contextlib.contextmanager
  def claimed(self, texts: Callable[[], dict[str, str]] = dict) -> Iterator[None]:
    """Marks the directory as this run's, and locks it inside the block; the same run may claim it again.

    texts: returns a digest of each text, and of the model, that a resume depends on, by option. All processes
    of a run must enter it. Raises InputError if another process uses the directory, or if a text or the
    model has changed since the run was started.
    """
    held: list[int] = []

    def claim() -> None:
      now = texts()
      held.append(self._claim(now))
      self._check_texts(now)

    try:
      decide(claim)
      yield
    finally:
      for descriptor in held:
        os.close(descriptor)

  def texts(self) -> dict[str, str]:
    """The digests of texts and model, by option, that the run in the directory was started with."""
    then = read_json(self.run, 'use another workdir').get('texts', {})  # older versions wrote none
    if not isinstance(then, dict):
      raise InputError(f'{self.run} is damaged: use another workdir')
    return then

  def _check_texts(self, now: dict[str, str]) -> None:
    then = self.texts()
    for field, digest in now.items():
      if then.get(field, digest) != digest:
        raise InputError(
          f'{field} is not what the run in --workdir={self.path} was started with: restore '
          f'it, or use another workdir'
        )

  def _claim(self, texts: dict[str, str]) -> int:
    """Writes run.json if it is missing; the descriptor of its lock."""
    self.path.mkdir(parents=True, exist_ok=True)
    if not self.run.exists():
      descriptor = self._lock(self._claiming)
      try:
        if not self.run.exists():  # nobody has claimed it meanwhile: the locked file becomes run.json
          content = self._identity | ({'texts': texts} if texts else {})
          with open(descriptor, 'w', encoding='utf-8', closefd=False) as file:
            file.truncate()
            file.write(json.dumps(content, indent=2) + '\n')
            file.flush()
            os.fsync(descriptor)
          self._claiming.replace(self.run)
          return os.dup(descriptor)  # has the same lock
      finally:
        self._claiming.unlink(missing_ok=True)  # left after an error such as a full disk
        os.close(descriptor)
    descriptor = self._lock(self.run)
    try:
      self._check_same()  # another run may have claimed the directory since `check`
    except InputError:
      os.close(descriptor)
      raise
    return descriptor

  def _lock(self, path: pathlib.Path) -> int:
    """A descriptor of the file, which is locked until it is closed. Raises InputError if it is locked."""
    try:
      planted = os.O_NOFOLLOW if path == self._claiming else 0  # it is truncated: not the target of a link
      descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | planted, 0o666)
    except OSError as error:
      if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP):
        raise
      raise InputError(f'--workdir={self.path} is not writable ({error.strerror}): choose another') from None
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(descriptor)
      raise InputError(
        f'--workdir={self.path} is in use by another process: wait until it ends, or name another directory'
      ) from None
    except OSError:  # a file system without locks
      pass
    return descriptor

  def _check_same(self) -> None:
    try:
      saved = json.loads(read_text(self.run))
      mode, before = saved['mode'], flatten(saved['config'])
    except InputError:
      raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      raise InputError(f'{self.run} is damaged: use another workdir') from None
    known = flatten(defaults())
    if unknown := sorted(before.keys() - known.keys()):
      raise InputError(
        f'--workdir={self.path} belongs to a run of another version, which has {unknown[0]}: use '
        f'another workdir, or that version to resume'
      )
    # Options added after the run was started have their default values, and are compared last. Options that
    # the mode does not read are ignored; version 0.1 wrote them too.
    now = {'mode': self._identity['mode']}
    now |= {field: value for field, value in flatten(self._identity['config']).items()}
    if mode in ('accel', 'prune') and self._identity['mode'] == 'export':
      raise InputError(
        f'--workdir={self.path} is the workdir of the run: write the export into another one, with '
        f'--workdir={self.path}-export and --config.model.source={self.path}'
      )
    then = {'mode': mode} | {field: value for field, value in before.items()}
    youngest = {field: value for field, value in known.items()}
    for name in sorted(now, key=lambda name: name not in then):
      if (was := then.get(name, youngest.get(name))) != (value := now[name]):
        raise InputError(
          f'--workdir={self.path} belongs to a run with {name} = {was!r}, not {value!r}: use another '
          f'workdir, or the same config to resume'
        )
