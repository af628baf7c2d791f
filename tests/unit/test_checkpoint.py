"""Checkpoints give back their very bits or one clear line, and the one before serves."""

import asyncio
import contextlib
import logging
import pathlib
import resource
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from adapt_jax.models.errors import InputError, disk_full
from adapt_jax.pipeline import checkpoint
from adapt_jax.pipeline.checkpoint import Checkpoints

META = [{'step': 1, 'loss': 0.1}, {'step': 2, 'loss': 0.25}]
SHAPES = {
  'params': {
    'a': jax.ShapeDtypeStruct((64, 48), jnp.float32),
    'b': jax.ShapeDtypeStruct((64,), jnp.bfloat16),
  },
  'optimizer': (jax.ShapeDtypeStruct((), jnp.int32), {'mu': jax.ShapeDtypeStruct((64, 48), jnp.float32)}),
}


def numbers(seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(99 * rng.standard_normal(x.shape), x.dtype), SHAPES)


def same(a, b):
  return all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def read(path):
  """Number, JSON and arrays of the newest checkpoint."""
  checkpoints = Checkpoints(path)
  try:
    number = checkpoints.latest()
    return number, checkpoints.meta(number), checkpoints.restore(number, SHAPES)
  finally:
    checkpoints.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('saved') / 'checkpoints'
  checkpoints = Checkpoints(path)
  for seed, meta in enumerate(META):
    checkpoints.save(numbers(seed), meta)
  checkpoints.close()
  return path


@pytest.fixture
def beside(monkeypatch):
  """Checkpoints are written while the run goes on, as on accelerators."""
  monkeypatch.setattr(checkpoint, 'on_cpu', lambda: False)


def test_a_finished_run_keeps_the_newest_or_none(saved, tmp_path):
  path = shutil.copytree(saved, tmp_path / 'checkpoints')
  for newest, left in ((1, ['2']), (0, [])):
    checkpoints = Checkpoints(path)
    checkpoints.close()
    checkpoints.keep(newest)
    assert sorted(found.name for found in path.glob('*')) == left
  assert not path.exists()


def test_a_lost_process_is_told_before_anything_else(tmp_path, monkeypatch, capfd):
  """JAX ends this process, in words of its own, milliseconds after the barrier has failed."""
  checkpoints, told = Checkpoints(tmp_path / 'checkpoints'), []

  def fails(*args, **options):
    raise jax.errors.JaxRuntimeError('INTERNAL: Barrier failed because: task is set to ERROR')

  monkeypatch.setattr(checkpoints._manager, 'save', fails)
  monkeypatch.setattr(checkpoints, '_remove_unfinished', lambda: told.append(capfd.readouterr().err))
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  with pytest.raises(jax.errors.JaxRuntimeError):
    checkpoints.save(numbers(0), META[0])
  assert len(told) == 1 and 'start all of them again to resume from the last checkpoint' in told[0]


def test_saving_does_not_ask_for_sigterm(tmp_path, monkeypatch):
  """JAX has one counter for all who ask, and would stop the run's processes at a number long gone by."""
  asked = []
  monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', lambda n: asked.append(n))
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  checkpoints.save(numbers(0), META[0])
  checkpoints.close()
  assert read(tmp_path / 'checkpoints')[0] == 1 and not asked


def damages(content: bytes, rng):
  """Name -> a damaged file, None if it is gone."""
  yield from (('half', content[: len(content) // 2]), ('empty', b''), ('gone', None))
  for place in rng.integers(len(content), size=2):
    flipped = bytearray(content)
    flipped[place] ^= 1 << rng.integers(8)
    yield f'bit in byte {place}', bytes(flipped)


def test_a_damaged_file_never_gives_other_numbers(saved, tmp_path):
  rng, refused, path = np.random.default_rng(0), set(), tmp_path / 'checkpoints'
  names = [file.relative_to(saved) for file in sorted((saved / '2').rglob('*')) if file.is_file()]
  for name in names:
    for damage, content in damages((saved / name).read_bytes(), rng):
      shutil.copytree(saved, path)
      (path / name).unlink() if content is None else (path / name).write_bytes(content)
      try:
        number, meta, arrays = read(path)
      except InputError as error:
        assert str(path / '2') in str(error) and 'delete' in str(error), (name, damage)
        refused.add((name, damage.split()[0]))
        shutil.rmtree(path / '2')
        number, meta, arrays = read(path)
        assert number == 1, (name, damage)
      assert meta == META[number - 1] and same(arrays, numbers(number - 1)), (name, damage)
      shutil.rmtree(path)
  largest = max(names, key=lambda name: (saved / name).stat().st_size)
  for name in (largest, pathlib.Path('2/meta/metadata')):
    assert {(name, damage) for damage in ('half', 'empty', 'gone', 'bit')} <= refused


def test_settings_of_the_process_stay_as_they_were(saved):
  def settings():
    return sys.unraisablehook, logging.getLogger('asyncio').level, logging.root.manager.disable

  before = settings()
  assert read(saved)[0] == 2 and settings() == before


def test_a_write_beside_training_has_the_state_that_was_saved(tmp_path, monkeypatch, beside):
  """The next step takes the arrays' memory. Older checkpoints stay until the write has ended."""
  path, go_on, finalize = tmp_path / 'checkpoints', threading.Event(), ocp.StandardCheckpointHandler.finalize
  checkpoints = Checkpoints(path)
  for seed in range(2):
    checkpoints.save(numbers(seed), META[seed])
  checkpoints.wait()
  held = lambda self, directory: go_on.wait(60) and finalize(self, directory)  # noqa: E731
  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'finalize', held)
  checkpoints.save(state := numbers(2), META[0])
  jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(lambda x: 0 * x, tree), donate_argnums=0)(state))
  assert sorted(found.name for found in path.iterdir() if found.name.isdigit()) == ['1', '2']
  go_on.set()
  checkpoints.close()
  assert read(path)[0] == 3 and same(read(path)[2], numbers(2))
  assert sorted(found.name for found in path.iterdir()) == ['2', '3']


@contextlib.contextmanager
def small_files():
  """Files may have few bytes, as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_only_the_first(path):
  assert read(path)[0] == 1 and same(read(path)[2], numbers(0))
  assert [p.name for p in path.iterdir()] == ['1']


def test_a_save_that_meets_a_full_disk_leaves_the_one_before(tmp_path):
  """In earnest, by a limit on the size of files."""
  path = tmp_path / 'checkpoints'
  checkpoints = Checkpoints(path)
  checkpoints.save(numbers(0), META[0])
  with small_files(), pytest.raises(Exception) as error:  # noqa: B017, PT011  whatever orbax raises
    checkpoints.save(numbers(1), META[1])
  assert disk_full(error.value) == 'File too large'
  assert_only_the_first(path)
  checkpoints.save(numbers(1), META[1])
  assert read(path)[0] == 2 and same(read(path)[2], numbers(1))


def test_a_save_that_fails_and_a_close_tell_nothing_more(tmp_path, caplog, recwarn):
  """Orbax's other tasks fail too or never begin, which would be told below the error of the run."""
  with caplog.at_level(logging.WARNING, 'asyncio'), caplog.at_level(logging.WARNING, 'absl'):
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    with small_files(), contextlib.suppress(Exception):  # whatever orbax raises
      checkpoints.save(numbers(0), META[0])
    checkpoints.close()
    caplog.clear()  # what came of an earlier test before this save
    for name in ('asyncio', 'absl'):
      logging.getLogger(name).error('an exception was never retrieved')  # it comes at any moment
    asyncio.sleep(0)  # a task that never begins
    assert not caplog.records and not recwarn.list


@pytest.mark.parametrize('then', ['save', 'close'])
def test_a_write_beside_training_that_fails_is_told_at_the_next_save(tmp_path, beside, capfd, then):
  path = tmp_path / 'checkpoints'
  checkpoints = Checkpoints(path)
  checkpoints.save(numbers(0), META[0])
  checkpoints.wait()
  with small_files(), pytest.raises(Exception) as error:  # noqa: B017, PT011  whatever orbax raises
    checkpoints.save(numbers(1), META[1])
    checkpoints.save(numbers(2), META[1]) if then == 'save' else checkpoints.close()
  assert disk_full(error.value) == 'File too large' and not capfd.readouterr().err
  assert_only_the_first(path)


@pytest.mark.parametrize(('shape', 'dtype'), [((63, 48), jnp.float32), ((64, 48), jnp.bfloat16)])
def test_a_checkpoint_of_another_model_is_refused(saved, shape, dtype):
  """Orbax would cast a dtype without a word."""
  target = SHAPES | {'params': SHAPES['params'] | {'a': jax.ShapeDtypeStruct(shape, dtype)}}
  with pytest.raises(InputError, match='params/a'):
    Checkpoints(saved).restore(2, target)
