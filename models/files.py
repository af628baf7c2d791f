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

from adapt_jax.models.errors import InputError, reading


def exists(path: pathlib.Path) -> bool:
  """Whether `path` exists; raises InputError if the system cannot tell.

  `Path.exists` itself raises for an unreadable directory and for a name that is too long.
  """
  with reading('', repr(str(path)), 'check the path and its permissions'):
    try:
      path.stat()
    except (FileNotFoundError, NotADirectoryError):
      return False
    return True


def local(name: str) -> pathlib.Path:
  """The path `name` with ~ and ~user replaced; InputError for an unknown user, and for a URL."""
  if '://' in name:
    raise InputError(
      f'{name!r} is not a path: object stores and URLs are not read: mount the bucket, or copy the files'
    )
  with reading('', repr(name), 'write out the path'):
    return pathlib.Path(name).expanduser()


def regular(path: str | pathlib.Path) -> pathlib.Path:
  """`path`, if it is a regular file or a link to one. Raises OSError if absent, InputError for anything else.

  Call it before a file is opened: opening a named pipe waits for a writer, and a device has no end.
  """
  path = pathlib.Path(path)
  if not stat.S_ISREG(path.stat().st_mode):
    raise InputError(f'{path} is not a regular file: name one')
  return path


def read_text(path: str | pathlib.Path, encoding: str = 'utf-8') -> str:
  """The text of a regular file. Raises as `regular`, and UnicodeDecodeError."""
  return regular(path).read_text(encoding=encoding)


def read_json(path: pathlib.Path, remedy: str = 'download it again') -> dict[str, Any]:
  """The object in a JSON file; InputError naming the file and the remedy if it is not one."""
  with reading('', path, remedy):
    values = json.loads(read_text(path))
    if not isinstance(values, dict):
      raise ValueError(f'{type(values).__name__} where an object should be')
    return values


def user_cache(name: str) -> pathlib.Path:
  """A cache directory of the user, in $XDG_CACHE_HOME or ~/.cache; it may be deleted at any time."""
  return local(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'adapt-jax' / name


def write_text(path: str | pathlib.Path, text: str) -> None:
  """Writes `text` atomically: readers see the old file or the new one, even if the process is killed."""
  with new_file(path) as new:
    new.write_text(text, encoding='utf-8')


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
    _remove(new)  # left by a killed process, or a planted link
    new.touch(exist_ok=False)
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
