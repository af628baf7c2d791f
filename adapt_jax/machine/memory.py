"""The memory of this machine, and what glibc does with freed memory; on other systems nothing is changed."""

import ctypes
import math
import os
import pathlib

# mallopt's parameters (malloc.h), and their values for `keep`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))


def keep() -> None:
  """Keeps what is freed in this process for its next use.

  XLA frees its temporary memory after every step on a CPU; glibc would return it to the system, which clears
  it anew for the next step. Call it before JAX finds its devices: threads that run by then keep their own
  arenas, to which large pieces do not return.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'gnu_get_libc_version'):
    for parameter, value in _KEEP:
      libc.mallopt(parameter, value)


def keep_only_small() -> None:
  """After `keep`: pieces of 32 MB or more are returned to the system again when they are freed.

  For large models, whose pieces leave gaps that later ones do not fit into: 5 GB in training 1.5 B weights.
  """
  libc = ctypes.CDLL(None)
  if hasattr(libc, 'gnu_get_libc_version'):
    libc.mallopt(_MMAP_THRESHOLD, 2**25)
    libc.mallopt(_MMAP_MAX, 2**16)


def give_back() -> None:
  """Returns what is free now to the system: compiling a training step of 30 layers leaves 0.7 GB."""
  if trim := getattr(ctypes.CDLL(None), 'malloc_trim', None):
    trim(0)


def total() -> int:
  """Bytes of memory that this machine has, or of those its container may use."""
  has = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  limit = pathlib.Path('/sys/fs/cgroup/memory.max')
  text = limit.read_text().strip() if limit.exists() else ''
  return min(has, int(text)) if text.isdigit() else has


def swap() -> float:
  """Bytes of swap; infinite where that is not known, as on macOS, which adds it as needed."""
  found = pathlib.Path('/proc/meminfo')
  lines = found.read_text().splitlines() if found.exists() else []
  sizes = [1024 * int(line.split()[1]) for line in lines if line.startswith('SwapTotal:')]
  return sizes[0] if sizes else math.inf
