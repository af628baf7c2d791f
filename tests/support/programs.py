"""One directory of compiled programs for all processes of tests, in this session and in later ones.

Tests compile the same tiny programs again and again; of each the first process keeps what it has compiled.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import jax
from jax._src import lru_cache
from jax._src.interpreters import mlir

from adapt_jax.machine import mesh

_KEEP = {'jax_persistent_cache_min_compile_time_secs': 0, 'jax_persistent_cache_min_entry_size_bytes': -1}


def keep() -> None:
  """This process reads and keeps programs where JAX_COMPILATION_CACHE_DIR says."""
  jax.config.update('jax_compilation_cache_dir', os.environ['JAX_COMPILATION_CACHE_DIR'])
  for name, value in _KEEP.items():
    jax.config.update(name, value)
  write_whole()
  lower_in_one_context()


def forget_old(files: Iterable[pathlib.Path], days: float = 14) -> None:
  """Deletes files that were not read for `days`."""
  for file in files:
    with contextlib.suppress(FileNotFoundError):  # which another session deleted
      if time.time() - file.stat().st_atime > days * 86_400:
        file.unlink()


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


def lower_in_one_context() -> None:
  """Programs share one context of MLIR: making one is a quarter of the time that a small program takes."""
  mlir.make_ir_context = functools.cache(mlir.make_ir_context)


_MADE: dict[Any, Any] = {}


@contextlib.contextmanager
def traced_once() -> Iterator[None]:
  """Runs without a mesh take programs that one of them has made: tracing is most of what a tiny run costs.

  They count what they take as compiled. A test that replaces a part of a model must not use it.
  """
  jit = mesh.jit

  def take(fn: Any, *args: Any, donate_argnums: tuple[int, ...] = (), once: bool = False) -> Any:
    made = jit(fn, *args, donate_argnums=donate_argnums, once=once)
    if once or not dataclasses.is_dataclass(fn) or not jax.sharding.get_mesh().empty:
      return made
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((tuple(x.shape), str(x.dtype)) for x in leaves)

    def compile(options: dict[str, Any]) -> Any:
      key = fn, donate_argnums, structure, shapes, repr(sorted(options.items()))
      if key not in _MADE:
        _MADE[key] = made.lower(*args).compile(options)
      return _MADE[key]

    return types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=compile))

  with mock.patch.object(mesh, 'jit', take):
    yield
