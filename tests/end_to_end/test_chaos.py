"""A small run that is killed, preempted, or meets a full disk, started again, ends with the same bits."""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests.support import runs
from tests.support.forks import Forks
from tests.support.starter import Starter

KILLS = 20
SEED = int(os.environ.get('ADAPT_JAX_TEST_SEED', '0'))  # another one kills at other moments
DISK, FILLER = 6_000_000, 4_300_000  # bytes; what is left takes two checkpoints and not a third
# What stops a run and, where it is told, the line that tells where it goes on.
STOPS = [
  ({'kill': 'SIGTERM'}, 'stopped by SIGTERM: run the same command to continue'),
  ({'limit': 600}, 'File too large'),  # of a file: run.json does not fit
  ({'kill': 'SIGKILL', 'after': {'event': 'prune', 'step': 2}}, ''),
  ({'kill': 'SIGKILL', 'after': {'event': 'evaluate', 'of': 'pruned', 'stage': 1}}, ''),
  ({'kill': 'SIGINT', 'after': {'event': 'train', 'step': 2}}, 'stopped by Ctrl-C at stage 1'),
  ({'limit': 20_000}, 'File too large'),  # nor a page, nor a checkpoint
  ({'kill': 'SIGKILL', 'after': {'event': 'heal'}}, ''),
  ({'kill': 'SIGKILL', 'after': {'event': 'train', 'step': 11}}, ''),
]
# Checkpoints are written beside training, as on accelerators, and take a second.
BESIDE = """
import pathlib, time
import orbax.checkpoint as ocp
from adapt_jax.pipeline import checkpoint
from tests.support import runs
finalize = ocp.StandardCheckpointHandler.finalize
ocp.StandardCheckpointHandler.finalize = lambda *args: time.sleep(1) or finalize(*args)
checkpoint.on_cpu = lambda: False
def get_config():
  return runs.make_config(pathlib.Path({!r}))
"""
FLAGS = (*runs.TWO_STAGES, '--config.prune.heal=1')
CODES = {'SIGTERM': 0, 'SIGINT': 130, 'SIGKILL': -signal.SIGKILL}


@pytest.fixture(scope='module')
def starter(files, tmp_path_factory):
  return Starter(tmp_path_factory.mktemp('starter'), files, FLAGS)


@pytest.fixture(scope='module')
def undisturbed(starter):
  path = starter.path / 'undisturbed'
  code, output = starter.run(path)
  assert code == 0, output
  return path


def left_over(path: pathlib.Path) -> list[pathlib.Path]:
  return [p for p in path.rglob('*') if 'tmp' in p.name.removeprefix('tmp_')]


def assert_no_space(code: int, output: str, path: pathlib.Path) -> None:
  """A line that names the workdir, and nothing half written."""
  *_, last = output.splitlines()
  assert code == 2 and 'Traceback' not in output and str(path) in last, output
  assert not left_over(path)


def test_whatever_stops_a_run_the_same_command_goes_on_to_the_same_bits(starter, undisturbed):
  """While it loads, scores, compensates, heals, trains and saves, in both stages."""
  path = starter.path / 'stopped'
  for stop, told in STOPS:
    code, output = starter.run(path, **stop)
    assert not (path / 'report.json').exists() and told in output, (stop, output)
    if 'limit' in stop:
      assert_no_space(code, output, path)
    else:
      assert code == CODES[stop['kill']], (stop, output)
  code, output = starter.run(path)
  assert code == 0 and 'resuming' in output, output
  runs.assert_same_end(path, undisturbed)


def test_an_export_that_does_not_fit_leaves_nothing(starter):
  path = starter.path / 'exported'
  assert_no_space(*starter.run(path, '--mode=export', limit=50_000), path)
  assert not (path / 'hf').exists()


@pytest.mark.chaos
def test_a_run_killed_while_a_checkpoint_is_written_beside_training(files, undisturbed, tmp_path):
  """It goes on from the one before; after SIGTERM it ends when the checkpoint is written."""
  (tmp_path / 'recipe.py').write_text(BESIDE.format(str(files)))
  starter, path = Starter(tmp_path, tmp_path, FLAGS), tmp_path / 'out'
  code, output = starter.run(path, kill='SIGKILL', after={'event': 'train', 'step': 4})
  assert code == -signal.SIGKILL and left_over(path / 'checkpoints'), output
  code, output = starter.run(path, kill='SIGTERM', after={'event': 'train', 'step': 4})
  assert code == 0 and 'stopped by SIGTERM at stage 1' in output and not left_over(path), output
  code, output = starter.run(path)
  assert code == 0 and 'resuming' in output, output
  runs.assert_same_end(path, undisturbed)


@contextlib.contextmanager
def small_disk(files, path):
  """A starter that sees a small file system at `path`, and where this process sees it."""
  script = f'mount -t tmpfs -o size={DISK} none "$0" && head -c {FILLER} /dev/zero > "$0/filler" && exec "$@"'
  prefix = ('unshare', '--map-root-user', '--mount', 'sh', '-c', script, str(path))
  if shutil.which('unshare') is None or subprocess.run((*prefix, 'true'), capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')
  forks = Forks(*prefix)
  try:
    yield Starter(path.parent, files, runs.TWO_STAGES, forks), pathlib.Path(f'/proc/{forks.pid}/root{path}')
  finally:
    forks.close()


@pytest.mark.chaos
def test_a_disk_full_of_checkpoints(files, undisturbed, tmp_path):
  """The two that are whole stay; with space the run goes on from the second."""
  (tmp_path / 'disk').mkdir()
  with small_disk(files, tmp_path / 'disk') as (starter, seen):
    path = tmp_path / 'disk/out'
    assert_no_space(*starter.run(path), path)
    assert [p for p in (seen / 'out/checkpoints').iterdir() if p.name.isdigit()] and not left_over(seen)
    (seen / 'filler').unlink()
    code, output = starter.run(path)
    assert code == 0 and 'resuming' in output, output
    runs.assert_same_end(seen / 'out', undisturbed)


def kill_at_random(starter: Starter, path: pathlib.Path, how: str, delay: float) -> tuple[int, str]:
  """Exit code and output of a run that is killed some seconds after it tells of itself, or begins to save."""
  pid = starter.start(path)
  begun = False
  while not begun and os.path.exists(f'/proc/{pid}'):
    time.sleep(0.001)
    begun = (
      any(path.glob('checkpoints/*tmp*'))
      if how == 'saving'
      else starter.output.exists() and starter.output.stat().st_size > 0
    )
  time.sleep(delay if begun else 0)
  with contextlib.suppress(ProcessLookupError):
    os.kill(pid, signal.SIGTERM if how == 'SIGTERM' else signal.SIGKILL)
  return starter.wait()


@pytest.mark.chaos
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(starter, undisturbed):
  """Each that comes to its end before its kill is compared, and another one begins."""
  rng, kills, number, moments = random.Random(SEED), 0, 0, [f'seed {SEED}']
  while kills < KILLS:
    path = starter.path / f'chaos-{number}'
    how = 'SIGTERM' if kills % 7 == 3 else 'saving' if kills % 3 == 1 else 'SIGKILL'
    delay = rng.random() * (0.05 if how == 'saving' else 3.0)
    code, output = kill_at_random(starter, path, how, delay)
    moments.append(f'{how} after {delay:.3f} s: {(output.splitlines() or [""])[-1][:60]}')
    if (path / 'report.json').exists():
      runs.assert_same_end(path, undisturbed)
      number += 1
    else:
      kills += 1
      assert code == (0 if how == 'SIGTERM' else -signal.SIGKILL), (moments, output)
  code, output = starter.run(path)
  assert code == 0, (moments, output)
  runs.assert_same_end(path, undisturbed)
