"""The one exception for input that a user can correct."""


class InputError(ValueError):
  """Bad input: a config field, a file or a checkpoint.

  The message is one line that names the field or file, the value found and the
  remedy; `main.py` prints it without a traceback and exits with code 2.
  """
