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
DISK, FILLER = 6_000_000, 4_600_000  # bytes; what is left takes two checkpoints and not a third


@pytest.fixture(scope='module')
def starter(files, tmp_path_factory):
  return Starter(tmp_path_factory.mktemp('starter'), files)


@pytest.fixture(scope='module')
def finished(starter):
  """The undisturbed run, which also keeps the programs of those that are disturbed."""
  path = starter.path / 'finished'
  code, output = starter.run(path)
  assert code == 0, output
  return path


def left_over(path: pathlib.Path) -> list[pathlib.Path]:
  return [p for p in path.rglob('*') if 'tmp' in p.name.removeprefix('tmp_')]


def test_sigterm_and_ctrl_c_end_where_the_same_command_goes_on(starter, finished):
  """While loading, pruning, training, and between a stage's training and its evaluation."""
  path = starter.path / 'sigterm'
  for kill, after, place in (
    ('SIGTERM', {}, ''),
    ('SIGINT', {'event': 'prune', 'step': 5}, ' at stage 1, pruning step 5, training step 0'),
    ('SIGINT', {'event': 'train', 'step': 4}, ' at stage 1, pruning step 17, training step 5'),  # one ran
    ('SIGTERM', {'event': 'train', 'step': 8}, ' at stage 1, pruning step 17, training step 8'),
  ):
    code, output = starter.run(path, kill=kill, after=after)
    assert code == (130 if kill == 'SIGINT' else 0) and not (path / 'report.json').exists(), output
    assert (
      f'stopped by {"Ctrl-C" if kill == "SIGINT" else kill}{place}: run the same command to continue'
      in output
    )
    assert 'Traceback' not in output and not left_over(path)
  code, output = starter.run(path)
  assert code == 0 and 'resuming at stage 1, training step 8' in output and 'stage 1 recover:' not in output
  runs.assert_same_end(path, finished)


def test_killed_run_continues_to_the_same_bits(starter, finished):
  """SIGKILL when the log shows the moment: scoring, compensating, training, between stages."""
  path = starter.path / 'killed'
  for after in (
    {'event': 'prune', 'step': 2},
    {'event': 'prune', 'step': 17},  # the last of its stage: what comes next is compensation
    {'event': 'evaluate', 'of': 'recovered', 'stage': 1},
    {'event': 'prune', 'step': 20},
    {'event': 'train', 'step': 10},
  ):
    assert starter.run(path, kill='SIGKILL', after=after)[0] == -signal.SIGKILL
    assert not (path / 'report.json').exists()
  code, output = starter.run(path)
  assert code == 0 and 'resuming' in output
  runs.assert_same_end(path, finished)


def refused(code: int, output: str, path: pathlib.Path, reason: str) -> None:
  *_, last = output.splitlines()
  assert code == 2 and 'Traceback' not in output, output
  assert last.startswith(f'error: --workdir={path}: {reason}') and 'free space' in last
  assert not left_over(path)


def test_a_full_disk_is_one_line_and_the_run_goes_on_from_what_is_saved(starter, finished):
  """Whatever cannot be written: run.json, the log, the page, hf/."""
  path = starter.path / 'limited'
  for limit in (600, 2_000, 20_000):
    refused(*starter.run(path, limit=limit), path, 'File too large')
  code, output = starter.run(path)
  assert code == 0 and 'resuming the pruning' in output
  runs.assert_same_end(path, finished)
  path = starter.path / 'exported'
  refused(*starter.run(path, '--mode=export', limit=100_000), path, 'File too large')
  assert not (path / 'hf').exists()


@contextlib.contextmanager
def small_disk(files, path):
  """A starter that sees a small file system at `path`, and where this process sees it."""
  script = f'mount -t tmpfs -o size={DISK} none "$0" && head -c {FILLER} /dev/zero > "$0/filler" && exec "$@"'
  prefix = ('unshare', '--map-root-user', '--mount', 'sh', '-c', script, str(path))
  if shutil.which('unshare') is None or subprocess.run((*prefix, 'true'), capture_output=True).returncode:
    pytest.skip('no file system can be mounted here')
  forks = Forks(*prefix)
  try:
    yield Starter(path.parent, files, forks), pathlib.Path(f'/proc/{forks.pid}/root{path}')
  finally:
    forks.close()


def test_a_disk_full_of_checkpoints(files, finished, tmp_path):
  """The two that are whole stay; with space the run goes on from the second."""
  (tmp_path / 'disk').mkdir()
  with small_disk(files, tmp_path / 'disk') as (starter, seen):
    path = tmp_path / 'disk/out'
    refused(*starter.run(path), path, 'No space left on device')
    assert [p for p in (seen / 'out/checkpoints').iterdir() if p.name.isdigit()] and not left_over(seen)
    (seen / 'filler').unlink()
    code, output = starter.run(path)
    assert code == 0 and 'resuming at stage' in output, output
    runs.assert_same_end(seen / 'out', finished)


class Chaos:
  """Kills runs at random moments; every run that comes to its end is compared with the undisturbed one."""

  def __init__(self, starter: Starter, finished: pathlib.Path, seed: int):
    self._starter, self._finished, self._random = starter, finished, random.Random(seed)
    self._number, self.moments = 0, list[str]()

  @property
  def _path(self) -> pathlib.Path:
    return self._starter.path / f'chaos-{self._number}'

  def kill(self, how: str, longest: float) -> bool:
    """One run, killed up to `longest` seconds after it has begun; False if it ended before."""
    pid = self._starter.start(self._path)
    delay = self._random.random()
    if how == 'saving':
      begun = self._wait(pid, lambda: any(self._path.glob('checkpoints/*tmp*')))
      delay *= 0.05
    else:
      begun = self._wait(pid, lambda: self._starter.output.exists() and self._starter.output.stat().st_size)
      delay *= longest
    time.sleep(delay if begun else 0)
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGTERM if how == 'SIGTERM' else signal.SIGKILL)
    code, output = self._starter.wait()
    if (self._path / 'report.json').exists():
      self._compare()
      return False
    last = (output.splitlines() or [''])[-1][:60]
    self.moments.append(f'{how} after {delay:.3f} s: {last}')
    assert code == (0 if how == 'SIGTERM' else -signal.SIGKILL), output
    return True

  def _wait(self, pid: int, come) -> bool:
    """Whether it came before the run ended."""
    while not come():
      if not os.path.exists(f'/proc/{pid}'):
        return False
      time.sleep(0.001)
    return True

  def finish(self) -> None:
    code, output = self._starter.run(self._path)
    assert code == 0, output
    self._compare()

  def _compare(self) -> None:
    runs.assert_same_end(self._path, self._finished)
    self._number += 1


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(starter, finished):
  chaos, kills = Chaos(starter, finished, SEED), 0
  try:
    while kills < KILLS:
      how = 'SIGTERM' if kills % 7 == 3 else 'saving' if kills % 3 == 1 else 'SIGKILL'
      kills += chaos.kill(how, longest=3.0)
    chaos.finish()
  except AssertionError:
    print(f'seed {SEED}', *chaos.moments, sep='\n')
    raise
