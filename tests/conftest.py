"""Four simulated devices for tests of sharding; without a mesh all else runs on the first, as on a laptop.

And one place for the code of exports, one for compiled programs. These are compiled with less of LLVM's
work on them, here and in the runs that tests start: for tiny models it is a good part of the time.
"""

import os
import sys

import jax
import pytest

os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=1')
jax.config.update('jax_num_cpu_devices', 4)


@pytest.fixture(scope='session', autouse=True)
def compiled_programs(tmp_path_factory):
  """Runs that tests start keep their programs here, not in the user's cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('programs')))
    yield


@pytest.fixture(scope='session')
def code_cache(tmp_path_factory):
  """transformers copies the code of a directory here before it imports it; one place in a process."""
  transformers = pytest.importorskip('transformers')
  with pytest.MonkeyPatch.context() as patch:
    place = str(tmp_path_factory.mktemp('modules'))
    patch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', place)
    patch.setattr(sys, 'path', list(sys.path))
    yield
