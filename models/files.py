"""Files that are whole or absent: write beside, then rename; and whether there is one."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from models.errors import InputError, first_line


def exists(path: pathlib.Path) -> bool:
  """Whether something is at `path`; InputError where the system will not say.

  `Path.exists` raises for a directory that may not be read and for a name that is too long.
  """
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError):
    return False
  except (OSError, ValueError) as error:  # ValueError: a null byte
    reason = getattr(error, 'strerror', None) or first_line(error)
    raise InputError(f'{str(path)!r} cannot be read ({reason}): check the path and its permissions') from None
  return True


def write_text(path: str | pathlib.Path, text: str) -> None:
  """Writes `text` so that a reader, or a kill at any moment, sees the old file or the new."""
  path = pathlib.Path(path)
  beside = path.with_name(f'.{path.name}.tmp')
  with open(beside, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


@contextlib.contextmanager
def new_directory(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary directory beside `path` that takes its place if the block succeeds.

  An existing directory at `path` is replaced; after an exception nothing is left behind.
  """
  path = pathlib.Path(path)
  beside = path.with_name(f'.{path.name}.tmp')
  shutil.rmtree(beside, ignore_errors=True)
  beside.mkdir(parents=True)
  try:
    yield beside
    if path.exists():
      shutil.rmtree(path)
    beside.rename(path)
  finally:
    shutil.rmtree(beside, ignore_errors=True)
