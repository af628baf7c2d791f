"""Opens .npy files of others."""

import pathlib
from typing import Any, Literal

import numpy as np

from adapt_jax.models.errors import reading
from adapt_jax.models.files import regular


def open_npy(path: str | pathlib.Path, mode: Literal['r', 'r+'] = 'r') -> Any:
  """Maps the array of a .npy file without reading it; numpy's archive object for a .npz file.

  Raises FileNotFoundError, and InputError for any other file that cannot be mapped.
  """
  file = regular(path)
  with reading('.npy file', path):
    return np.load(file, mmap_mode=mode, allow_pickle=False)
