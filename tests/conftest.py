"""Four simulated devices for tests of sharding; without a mesh all else runs on the first, as on a laptop.

And one place for the code of exports, one for the compiled programs of all processes. These are compiled
with less of LLVM's work on them, here and in the runs that tests start: for tiny models it is a good part of
the time.
"""

import gc
import os
import pathlib
import sys

import jax
import pytest

from tests.support import programs

TESTS = pathlib.Path(__file__).parent
CACHE = 'JAX_COMPILATION_CACHE_DIR'
# Each file runs in one process (--dist=loadfile): these take longest, and the last one decides the end.
FIRST = (
  'test_smollm2', 'test_distributed', 'test_chaos', 'test_compare', 'test_run', 'test_estimate',
  'test_scorer', 'test_harness', 'test_every_method', 'test_sensitivity', 'test_pruner',
)  # fmt: skip

QUICKLY = (
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  '--xla_cpu_parallel_codegen_split_count=1',  # a tenth of the time: their parts are too small to share out
  # A third of the time; not with optimisation. JAX 0.12 crashes with it.
  *(('--xla_cpu_use_fusion_emitters=false',) if jax.__version_info__ < (0, 11) else ()),
)
os.environ.setdefault('XLA_FLAGS', ' '.join(QUICKLY))
jax.config.update('jax_num_cpu_devices', 4)


def pytest_configure(config):
  """Compiled programs are kept from one session of tests to the next; their keys hold program and flags."""
  kept = pathlib.Path.home() / '.cache/adapt-jax'
  os.environ.setdefault(CACHE, str(kept / f'tests-jax-{jax.__version__}'))
  pathlib.Path(os.environ[CACHE]).mkdir(parents=True, exist_ok=True)
  programs.keep()
  if not hasattr(config, 'workerinput'):  # which only workers have
    programs.forget_old(kept.glob('tests-jax-*/*'))


def pytest_collection_modifyitems(items):
  """A test's kind is its folder, unless it names end_to_end itself; the longest files begin."""
  for item in items:
    if item.get_closest_marker('end_to_end') is None:
      item.add_marker(item.path.relative_to(TESTS).parts[0])
  items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


def pytest_collection_finish():
  """Python no longer looks through what is imported by now for garbage: it took a tenth of a tiny run."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope='session', autouse=True)
def training_in_float32():
  """By default; the speed of products wavers here, and no test depends on it."""
  from adapt_jax.training import precision

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(precision, 'speedup', lambda: 1.0)
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


@pytest.fixture(scope='session')
def files(tmp_path_factory):
  """What `runs.make_files` makes; tests that alter a file of it work on a copy."""
  from tests.support import runs

  return runs.make_files(tmp_path_factory.mktemp('files'))


@pytest.fixture(scope='session')
def finished(files, tmp_path_factory):
  """The workdir of a finished run of `runs.make_config`, with health; tests that alter it work on a copy."""
  from tests.support import runs

  path = tmp_path_factory.mktemp('finished') / 'out'
  config = runs.make_config(files)
  config.evaluate.health = True
  with pytest.MonkeyPatch.context() as patch:
    runs.keep_checkpoints(patch)
    runs.in_process(config, path, whole=True)
  return path
