"""One directory of compiled programs for all processes of a session of tests.

Tests compile the same tiny programs again and again; of each the first process keeps what it has compiled.
"""

import os
import pathlib
from typing import Any

import jax
from jax._src import lru_cache

_KEEP = {'jax_persistent_cache_min_compile_time_secs': 0, 'jax_persistent_cache_min_entry_size_bytes': -1}


def keep() -> None:
  """This process reads and keeps programs where JAX_COMPILATION_CACHE_DIR says."""
  jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
  for name, value in _KEEP.items():
    jax.config.update(name, value)
  write_whole()


def write_whole() -> None:
  """Others see a program when all of it is written.

  JAX writes into the file that others read, and leaves half of one where it is killed meanwhile: whoever
  reads that warns on stderr and compiles.
  """
  lru_cache.LRUCache.put = _put  # type: ignore[method-assign]


def _put(self: Any, key: str, value: bytes) -> None:
  path = pathlib.Path(str(self.path), f'{key}-cache')
  if not path.exists():
    part = path.with_name(f'{key}.{os.getpid()}.part')
    part.write_bytes(value)
    part.replace(path)
