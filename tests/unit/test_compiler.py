"""Compiled programs on disk, and programs that run once."""

import json
import os
import subprocess
import sys

import jax
import numpy as np

from adapt_jax.machine import mesh
from adapt_jax.machine.compiler import Compiler, forget_traces
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from models.config import LayerShape, ModelConfig, RopeConfig
from models.network import llama
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


def test_a_program_that_runs_once_gives_the_same_bits():
  config = ModelConfig('llama', 64, 32, 8, (LayerShape(4, 2, 48),) * 2, RopeConfig(1e4), 1e-5, True)
  params = llama.init_params(config, jax.random.key(0))
  rng = np.random.default_rng(0)
  plan = PrunePlan((np.array([True, False]),) * 2, tuple(rng.random(48) < 0.5 for _ in range(2)))

  def there_and_back(params):
    return surgery.stack(surgery.compact(params, plan), plan, np.float32)

  found, expected = (mesh.jit(there_and_back, params, once=once)(params) for once in (True, False))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert 0 < np.count_nonzero(found['layers']['mlp']['gate'][0]) == plan.ffn_widths[0] * 32


def test_stacking_holds_little_beside_its_result():
  """Not every layer at its original widths: what one of the leaves takes, of nine in a layer."""
  config = ModelConfig('llama', 64, 64, 16, (LayerShape(4, 2, 192),) * 8, RopeConfig(1e4), 1e-5, True)
  dense = PrunePlan.dense(config)
  plan = PrunePlan(dense.kv, tuple(np.arange(192) % 5 > 0 for _ in dense.ffn))
  params = jax.eval_shape(lambda p: surgery.compact(p, plan), llama.abstract_params(config))
  program = mesh.jit(lambda p: surgery.stack(p, plan, np.float32), params, once=True)
  planned = program.lower(params).compile().memory_analysis()
  assert planned.temp_size_in_bytes < 0.3 * planned.output_size_in_bytes


def test_forgotten_traces_are_taken_again_and_compiled_programs_stay():
  traces = []

  def double(x):
    traces.append(x.shape)
    return 2 * x

  x = np.arange(3.0)
  program, jitted = Compiler()('double', double, x), jax.jit(double)
  jitted(x), jitted(x)
  assert len(traces) == 1
  forget_traces()
  np.testing.assert_array_equal(program(x), 2 * x)
  assert len(traces) == 1
  jitted(x)
  assert len(traces) == 2
