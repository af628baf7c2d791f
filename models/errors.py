"""The one exception for input that a user can correct."""


class InputError(ValueError):
  """Bad input: a config field, a file or a checkpoint.

  The message is one line that names the field or file, the value found and the
  remedy; `main.py` prints it without a traceback and exits with code 2.
  """


def first_line(error: BaseException) -> str:
  """The first line of an error's message, or the name of its class if it has none."""
  return next(iter(str(error).strip().splitlines()), type(error).__name__)
