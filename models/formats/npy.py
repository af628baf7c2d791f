"""Opens .npy files of others: a header is Python code, which may be damaged in many ways."""

import pathlib
from typing import Any, Literal

import numpy as np

from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.files import regular


def open_npy(path: str | pathlib.Path, mode: Literal['r', 'r+'] = 'r') -> Any:
  """Maps the array of a .npy file without reading it; numpy's archive object for a .npz file.

  Raises FileNotFoundError, and InputError for a file that is not regular or not readable.
  """
  regular_path = regular(path)
  try:
    return np.load(regular_path, mmap_mode=mode, allow_pickle=False)
  except Exception as error:  # those of numpy, of Python's parser and of a huge shape share no other class
    raise InputError(f'{path}: not a readable .npy file ({first_line(error)})') from None
