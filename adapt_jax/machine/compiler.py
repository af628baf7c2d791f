"""Compiles programs ahead of time, so that each compile is counted and no call can recompile.

Compiled programs are cached on disk, for later runs on the same kind of machine.
"""

import collections
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from adapt_jax.machine import memory, mesh
from adapt_jax.machine.progress import phase
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import user_cache
from adapt_jax.models.network.backend import compiler_options

# By default, JAX caches only programs that took a second to compile; there are hundreds of small ones. There
# is no size limit: with one, a kill between two files of an entry disables the cache (jax-ml/jax#39880).
_CACHE = {'jax_persistent_cache_min_compile_time_secs': 0, 'jax_persistent_cache_min_entry_size_bytes': -1}


def keep_programs() -> None:
  """Caches compiled programs in the user's cache directory, which may be deleted at any time.

  Call it before anything is compiled. JAX's own variables (such as JAX_COMPILATION_CACHE_DIR, for a directory
  shared by a cluster) take precedence; JAX_ENABLE_COMPILATION_CACHE=false disables the cache. So does a
  directory that cannot be written. Several processes need JAX_COMPILATION_CACHE_DIR: only the first process
  writes its node's directory, so after a restart some would compile and others not.
  """
  settings: dict[str, Any] = dict(_CACHE)
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    try:
      directory = user_cache('programs')
      directory.mkdir(parents=True, exist_ok=True)
    except (OSError, InputError):  # the latter: no home
      return
    if jax.process_count() > 1 or not os.access(directory, os.W_OK):
      return
    settings['jax_compilation_cache_dir'] = str(directory)
  for name, value in settings.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def forget_traces() -> None:
  """Frees JAX's tracing caches: programs of `jax.jit`, and 0.1 GB after a training step of 30 layers.

  Programs of `Compiler` remain; a function under `jax.jit` is traced again at its next call.
  """
  jax.clear_caches()
  memory.give_back()


class Programs:
  """Compiled programs shared by the runs of a process; an LRU cache of `most` programs for each name."""

  def __init__(self, most: int = 8):
    self._most = most
    self._by_name: dict[str, collections.OrderedDict[Any, Any]] = {}

  def get(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
    """The program for `key`, made if there is none."""
    programs = self._by_name.setdefault(name, collections.OrderedDict())
    if key not in programs:
      programs[key] = make()
    programs.move_to_end(key)
    if len(programs) > self._most:
      programs.popitem(last=False)
    return programs[key]


class Compiler:
  """Compiles and counts by name.

  `counts` is per name, without programs found in `programs`. A compiled program called with other shapes or
  dtypes raises TypeError instead of compiling again.
  """

  def __init__(self, programs: Programs | None = None) -> None:
    self.counts: dict[str, int] = {}
    self._programs = programs

  def __call__(
    self,
    name: str,
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: tuple[int, ...] = (),
    xla_options: dict[str, Any] | None = None,
    part: str = '',
  ) -> Any:
    """`fn` compiled for the shapes, dtypes and placements of `args` (arrays or `jax.ShapeDtypeStruct`).

    On a mesh its results are placed by their leaves' names (`models.network.sharding`). `xla_options` are
    compiler options and must depend only on `fn` and the platform.

    `part`: which of several programs of one name it is, each of which has its own place in `programs`.
    A program is shared only if its `fn` is a dataclass: only dataclasses can be compared by their values.
    """

    def compile() -> Any:
      with phase(f'compiling {name}'):
        lowered = mesh.jit(fn, *args, donate_argnums=donate_argnums).lower(*args)
        program = lowered.compile(compiler_options() | (xla_options or {}))
      memory.give_back()
      self.counts[name] = self.counts.get(name, 0) + 1
      return program

    if self._programs is None or not dataclasses.is_dataclass(fn):
      return compile()
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((tuple(x.shape), str(x.dtype)) for x in leaves)
    return self._programs.get(f'{name} {part}', (fn, structure, shapes, donate_argnums), compile)
