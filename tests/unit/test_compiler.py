"""Programs that run once, and traces that are forgotten."""

import ctypes
import subprocess
import sys

import jax
import numpy as np
import pytest

from adapt_jax.machine import mesh
from adapt_jax.machine.compiler import Compiler, forget_traces
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network import llama
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan


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


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'gnu_get_libc_version'), reason='glibc alone is told')
@pytest.mark.parametrize('returned', [False, True])
def test_large_pieces_are_kept_for_their_next_use_or_returned(returned):
  """Where training takes more than half of the memory, they are returned."""
  program = f"""
import ctypes
from adapt_jax.machine import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
memory.keep()
if {returned}:
  memory.keep_only_small()
large = libc.malloc(2**28)
ctypes.memset(large, 1, 2**28)
libc.malloc(1000)
libc.free(large)
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))
"""
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
  assert (int(done.stdout) < 2**18) == returned  # kB
