"""Errors that a user can correct: an exception for bad input, and detection of a full or read-only disk."""

import contextlib
import errno
import os
import pathlib
import re
import socket
from collections.abc import Iterator

_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_DENIED = tuple(os.strerror(number) for number in (errno.EROFS, errno.EACCES, errno.EPERM))
_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)
_LONGEST, _FIRST = 2000, 1500  # characters of a message, and those that are kept of its beginning


class InputError(ValueError):
  """Bad input: a config field, a file or a checkpoint.

  The message is one line that names the field or file, the value found and the
  remedy; `main.py` prints it without a traceback and exits with code 2. Names and values come
  from files of others: characters that are not printable are escaped, and of a very long message
  the middle is left out.
  """

  def __init__(self, message: str):
    plain = ''.join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    super().__init__(plain if len(plain) <= _LONGEST else f'{plain[:_FIRST]} … {plain[_FIRST - _LONGEST :]}')


class Unreachable(InputError):
  """Raised for a name that may be of the hub, while the hub cannot be reached."""


@contextlib.contextmanager
def reading(what: str, path: object = '', remedy: str = 'check the file') -> Iterator[None]:
  """Turns any error of the block into one InputError: what was read, which file, the reason, what to do.

  The boundary of each reader of files of others, in place of a check for each kind of damage. It also catches
  panics of the tokenizers library, which are no `Exception`; a full disk is not the file's fault.
  """
  try:
    yield
  except InputError:
    raise
  except BaseException as error:
    panic = type(error).__name__ == 'PanicException'
    if not (panic or isinstance(error, Exception)) or disk_full(error):
      raise
    reason = getattr(error, 'strerror', None) or first_line(error)
    kind = '' if isinstance(error, (OSError, ValueError)) else f'{type(error).__name__}: '
    raise InputError(f'{" ".join(filter(None, (what, str(path))))}: {kind}{reason}: {remedy}') from error


def unreachable(error: BaseException | None) -> bool:
  """Whether a connection that failed caused the error, and not the user's wish to stay offline.

  HTTP libraries wrap the system's errors.
  """
  found = False
  while error is not None:
    if type(error).__name__ == 'OfflineModeIsEnabled':  # huggingface_hub is imported where it is used
      return False
    found |= isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
    found |= isinstance(error, OSError) and error.errno in _NO_ROUTE
    error = error.__cause__ or error.__context__
  return found


def first_line(error: BaseException) -> str:
  """The first line of an error's message, or the name of its class if it has none."""
  return next(iter(str(error).strip().splitlines()), type(error).__name__)


def disk_full(error: BaseException | None) -> str:
  """The system's message if a full disk, quota or file size limit caused `error`; '' for other errors.

  Detected by the text, because tensorstore and safetensors wrap the system's errors in their own.
  """
  return _reason(error, _FULL)


def write_denied(error: BaseException | None, directory: str) -> str:
  """The system's message if it refuses to write a file in `directory`; '' for other errors."""
  name = re.escape(f'{pathlib.Path(directory)}{os.sep}')
  return _reason(error, _DENIED, rf'(?<![\w./-]){name}') if directory else ''


def _reason(error: BaseException | None, reasons: tuple[str, ...], beside: str = '') -> str:
  while error is not None:
    for reason in reasons:
      if reason in str(error) and re.search(beside, str(error)):
        return reason
    error = error.__cause__ or error.__context__
  return ''
