"""Compiled programs on disk: what one process keeps, the next one finds."""

import json
import os
import subprocess
import sys

from tests.support import runs

PROGRAM = """
import json

import jax
import jax.numpy as jnp

from adapt_jax.machine.compiler import Compiler, keep_programs

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit('/', 1)[-1]))
keep_programs()
x = jnp.arange(8.0)
compiler = Compiler()
value = compiler('sum', lambda x: (x * x).sum(), x)(x)
found = {name: events.count(name) for name in ('cache_hits', 'cache_misses')}
print(json.dumps(found | {'value': float(value), 'counts': compiler.counts}))
"""


def ask(**env):
  base = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'XDG_'))}
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM],
    env=base | {'PYTHONPATH': str(runs.ROOT)} | env,
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def test_programs_are_found_again_however_quickly_compiled(tmp_path):
  first, second = (ask(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2))
  assert first['cache_hits'] == 0 and first['cache_misses'] > 0
  assert second['cache_misses'] == 0 and second['cache_hits'] == first['cache_misses']
  assert first['value'] == second['value'] == 140
  assert first['counts'] == second['counts'] == {'sum': 1}


def test_jax_own_directory_comes_first(tmp_path):
  ask(XDG_CACHE_HOME=str(tmp_path / 'home'), JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'own'))
  assert list(tmp_path.glob('own/jit_*-cache')) and not (tmp_path / 'home').exists()
