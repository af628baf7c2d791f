"""A workdir belongs to one process at a time, and is free again however that process ends."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from adapt_jax.models.errors import InputError
from adapt_jax.pipeline.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]
IDENTITY = {'mode': 'accel', 'config': {'seed': 0}}
HOLDER = """
import sys, time
from adapt_jax.pipeline.workdir import Workdir
with Workdir(sys.argv[1], {'mode': 'accel', 'config': {'seed': 0}}).claimed():
  print('held', flush=True)
  time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that uses the workdir tmp_path/out."""
  command = [sys.executable, '-c', HOLDER, str(tmp_path / 'out')]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def test_a_second_process_is_refused_before_any_work_and_later_served(tmp_path, holder):
  workdir = Workdir(str(tmp_path / 'out'), IDENTITY)
  with pytest.raises(InputError, match=r'--workdir=.*/out is in use by another process: wait'):
    workdir.check()
  with pytest.raises(InputError, match='in use'), workdir.claimed():
    pass
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  workdir.check()
  with workdir.claimed():
    pass


def test_the_same_process_may_claim_it_again(tmp_path):
  workdir = Workdir(str(tmp_path / 'out'), IDENTITY)
  for _ in range(2):
    workdir.check()
    with workdir.claimed():
      assert json.loads(workdir.run.read_text()) == IDENTITY
      assert [path.name for path in workdir.path.iterdir()] == ['run.json']


def test_a_text_that_has_changed_is_named(tmp_path):
  workdir = Workdir(str(tmp_path / 'out'), IDENTITY)
  with workdir.claimed(lambda: {'train.source': 'a', 'evaluate.source (web)': 'b'}):
    pass
  changed = workdir.claimed(lambda: {'train.source': 'a', 'evaluate.source (web)': 'c'})
  with pytest.raises(InputError, match=r'evaluate\.source \(web\) is not what the run'), changed:
    pass
  with workdir.claimed(lambda: {'train.source': 'a'}):  # free again, and another mode's texts do not matter
    pass


def test_a_kill_while_claiming_leaves_a_directory_that_can_be_claimed(tmp_path):
  workdir = Workdir(str(tmp_path / 'out'), IDENTITY)
  workdir.path.mkdir()
  (workdir.path / '.run.json.tmp').write_text('{"mo')
  workdir.check()
  with workdir.claimed():
    assert json.loads(workdir.run.read_text()) == IDENTITY


def test_two_that_start_at_once_do_not_both_have_it(tmp_path):
  """Both find no run.json; the one that is later locks what the first has written."""
  first, second = (Workdir(str(tmp_path / 'out'), IDENTITY) for _ in range(2))
  second.path.mkdir()
  descriptor = second._lock(second._claiming)  # the second is about to write
  with pytest.raises(InputError, match='in use'), first.claimed():
    pass
  os.close(descriptor)
  with first.claimed(), pytest.raises(InputError, match='in use'), second.claimed():
    pass


def test_a_directory_that_another_run_has_claimed_since_the_check_is_refused(tmp_path):
  ours = Workdir(str(tmp_path / 'out'), IDENTITY)
  ours.check()
  with Workdir(str(tmp_path / 'out'), {'mode': 'accel', 'config': {'seed': 1}}).claimed():
    pass
  with pytest.raises(InputError, match='belongs to a run with seed = 1'), ours.claimed():
    pass


def test_a_home_directory_is_that_of_the_user(tmp_path, monkeypatch):
  """The shell does not expand `--workdir=~/out`."""
  monkeypatch.setenv('HOME', str(tmp_path))
  assert Workdir('~/out', {}).path == tmp_path / 'out'
