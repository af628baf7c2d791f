"""Compiled programs on disk: what one process keeps, the next one finds."""

import json
import os
import signal
import subprocess
import sys
import time

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
  assert list((tmp_path / 'adapt-jax/programs').glob('jit_*-cache'))


def test_jax_own_variables_come_first(tmp_path):
  own, home = tmp_path / 'own', tmp_path / 'home'
  ask(XDG_CACHE_HOME=str(home), JAX_COMPILATION_CACHE_DIR=str(own))
  assert list(own.glob('jit_*-cache')) and not home.exists()
  slow = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1000'}
  assert ask(XDG_CACHE_HOME=str(tmp_path / 'slow'), **slow)['cache_misses'] == 0
  off = ask(XDG_CACHE_HOME=str(home), JAX_ENABLE_COMPILATION_CACHE='false')
  assert off['cache_hits'] == off['cache_misses'] == 0


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path):
  (tmp_path / 'adapt-jax').write_text('a file where the directory should be')
  assert ask(XDG_CACHE_HOME=str(tmp_path)) == {
    'cache_hits': 0,
    'cache_misses': 0,
    'value': 140,
    'counts': {'sum': 1},
  }


def test_a_second_run_compiles_nothing(tmp_path):
  files, cache = runs.make_files(tmp_path), tmp_path / 'programs'

  def run(name):
    env = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache)}
    command = runs.command(files, tmp_path / name, '--config.train.save_every=100')
    subprocess.run(command, env=env, cwd=runs.ROOT, check=True, capture_output=True)
    return {path.name for path in cache.glob('*-cache')}

  first = run('first')
  steps = [name for name in first if name.startswith('jit_step')]
  assert len(steps) == 2  # one of each stage's shapes
  assert run('second') == first
  reports = [json.loads((tmp_path / name / 'report.json').read_text()) for name in ('first', 'second')]
  assert reports[0]['perplexity'] == reports[1]['perplexity']


def test_a_resumed_run_compiles_nothing_that_the_first_start_compiled(tmp_path):
  """Its arrays come from a checkpoint and not from the model; their programs are the same."""
  files, cache = runs.make_files(tmp_path), tmp_path / 'programs'
  env = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(cache)}

  def start(name):
    command = runs.command(files, tmp_path / name)
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    return subprocess.Popen(command, env=env, cwd=runs.ROOT, **quiet)

  assert start('whole').wait() == 0
  known = {path.name for path in cache.glob('*-cache')}
  process, log, deadline = start('stopped'), tmp_path / 'stopped/metrics.jsonl', time.monotonic() + 300
  while not log.exists() or '"train"' not in log.read_text():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGTERM)
  assert process.wait() == 0 and not (tmp_path / 'stopped/report.json').exists()
  assert start('stopped').wait() == 0 and (tmp_path / 'stopped/report.json').exists()
  assert {path.name for path in cache.glob('*-cache')} == known
