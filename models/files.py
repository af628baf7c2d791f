"""Reads regular files only, and writes files and directories completely or not at all (by a rename).

Files and paths may come from others: a named pipe or a device would be read for ever.
"""

import contextlib
import json
import os
import pathlib
import shutil
import stat
import zlib
from collections.abc import Iterator
from typing import Any

from adapt_jax.models.errors import InputError, first_line


def exists(path: pathlib.Path) -> bool:
  """Whether `path` exists; raises InputError if the system cannot tell.

  `Path.exists` itself raises for an unreadable directory and for a name that is too long.
  """
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError):
    return False
  except (OSError, ValueError) as error:  # ValueError: a null byte
    reason = getattr(error, 'strerror', None) or first_line(error)
    raise InputError(f'{str(path)!r} cannot be read ({reason}): check the path and its permissions') from None
  return True


def local(name: str) -> pathlib.Path:
  """The path `name` with ~ and ~user replaced; InputError for an unknown user."""
  try:
    return pathlib.Path(name).expanduser()
  except RuntimeError:
    raise InputError(f'{name!r}: no such user or home directory: write out the path') from None


def regular(path: str | pathlib.Path) -> pathlib.Path:
  """`path`, if it is a regular file or a link to one. Raises OSError if absent, InputError for anything else.

  Call it before a file is opened: opening a named pipe waits for a writer, and a device has no end.
  """
  path = pathlib.Path(path)
  mode = path.stat().st_mode
  if not stat.S_ISREG(mode):
    kinds = {stat.S_IFDIR: 'directory', stat.S_IFIFO: 'named pipe', stat.S_IFSOCK: 'socket'}
    raise InputError(f'{path} is a {kinds.get(stat.S_IFMT(mode), "device")}, not a file: name a regular file')
  return path


def read_text(path: str | pathlib.Path, encoding: str = 'utf-8') -> str:
  """The text of a regular file. Raises as `regular`, and UnicodeDecodeError."""
  return regular(path).read_text(encoding=encoding)


def read_json(path: pathlib.Path, remedy: str = 'download it again') -> dict[str, Any]:
  """The object in a JSON file; InputError naming the file and the remedy if it is not one."""
  try:
    found = json.loads(read_text(path))
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror}): check the file') from None
  except InputError:
    raise
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path}: not valid JSON ({first_line(error)}): {remedy}') from None
  if not isinstance(found, dict):
    raise InputError(f'{path}: holds {type(found).__name__}, not an object: {remedy}')
  return found


def user_cache(name: str) -> pathlib.Path:
  """A cache directory of the user, in $XDG_CACHE_HOME or ~/.cache; it may be deleted at any time.

  Raises InputError for a user without a home directory.
  """
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  try:
    return pathlib.Path(base).expanduser() / 'adapt-jax' / name
  except RuntimeError:
    raise InputError(
      f'XDG_CACHE_HOME is not set, and {base!r} has no home directory: set XDG_CACHE_HOME to a directory'
    ) from None


def write_text(path: str | pathlib.Path, text: str) -> None:
  """Writes `text` atomically: readers see the old file or the new one, even if the process is killed."""
  path, new = pathlib.Path(path), beside(path)
  try:
    with open(_created(new), 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    new.replace(path)
  finally:
    new.unlink(missing_ok=True)  # left after an error such as a full disk


def json_checksum(values: dict[str, Any]) -> int:
  """A checksum of values that JSON can hold; it is the same after they were written and read."""
  return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def beside(path: str | pathlib.Path) -> pathlib.Path:
  """The temporary path, in the same directory, to which the content of `path` is written first."""
  path = pathlib.Path(path)
  return path.with_name(f'.{path.name}.tmp')


@contextlib.contextmanager
def new_file(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path to write to; the file is renamed to `path` if the block succeeds.

  An existing file at `path` is replaced; after an exception the temporary file is removed.
  """
  path, new = pathlib.Path(path), beside(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    os.close(_created(new))
    yield new
    _sync(new)
    new.replace(path)
  finally:
    new.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary directory, which is renamed to `path` if the block succeeds.

  An existing directory at `path` is replaced; after an exception the temporary directory is removed.
  """
  path, new = pathlib.Path(path), beside(path)
  _remove(new)
  new.mkdir(parents=True)
  try:
    yield new
    for file in new.rglob('*'):
      if file.is_file():
        _sync(file)
    _remove(path)
    new.rename(path)
  finally:
    shutil.rmtree(new, ignore_errors=True)


def _created(new: pathlib.Path) -> int:
  """A descriptor of a new, empty file; what a killed process left there, or a planted link, is removed."""
  _remove(new)
  return os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _remove(path: pathlib.Path) -> None:
  """Removes a file, a directory or a link itself, if there is one."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _sync(path: pathlib.Path) -> None:
  """Waits until a file is on disk: otherwise the rename may reach the disk before the content."""
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
