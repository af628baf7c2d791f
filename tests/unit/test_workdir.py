"""A workdir belongs to one process at a time, and is free again however that process ends."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import filelock
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
def workdir(tmp_path):
  return Workdir(str(tmp_path / 'out'), IDENTITY)


@pytest.mark.end_to_end
def test_a_second_process_is_refused_before_any_work_and_later_served(workdir):
  command = [sys.executable, '-c', HOLDER, str(workdir.path)]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(InputError, match='in use'):
      workdir.check()
    with pytest.raises(InputError, match='in use'), workdir.claimed():
      pass
    os.kill(holder.pid, signal.SIGKILL)
  workdir.check()
  with workdir.claimed():
    pass


def test_a_changed_text_is_named(workdir):
  with workdir.claimed(lambda: {'train.source': 'a', 'evaluate.source (web)': 'b'}):
    pass
  changed = workdir.claimed(lambda: {'train.source': 'a', 'evaluate.source (web)': 'c'})
  with pytest.raises(InputError, match=r'evaluate\.source \(web\)'), changed:
    pass
  with workdir.claimed(lambda: {'train.source': 'a'}):  # free again, and another mode's texts do not matter
    assert json.loads(workdir.run.read_text()).items() >= IDENTITY.items()


def test_a_kill_while_claiming_leaves_a_directory_that_can_be_claimed(workdir):
  workdir.path.mkdir()
  for name in ('.run.json.tmp', '.lock'):
    (workdir.path / name).write_text('{"mo')
  workdir.check()
  with workdir.claimed():
    assert json.loads(workdir.run.read_text()) == IDENTITY


def test_a_directory_of_another_run_or_with_other_files_is_refused(workdir, tmp_path):
  workdir.check()
  with Workdir(str(workdir.path), {'mode': 'accel', 'config': {'seed': 1}}).claimed():
    pass
  with pytest.raises(InputError, match='seed = 1'), workdir.claimed():
    pass
  (tmp_path / 'file').write_text('')
  for path in (tmp_path, tmp_path / 'file'):
    with pytest.raises(InputError, match=str(path)):
      Workdir(str(path), IDENTITY).check()


def test_a_lock_that_the_file_system_refuses_is_said(workdir, monkeypatch, capsys):
  def refuse(self):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(filelock.FileLock, 'acquire', refuse)
  with workdir.claimed():
    assert json.loads(workdir.run.read_text()) == IDENTITY
  said = capsys.readouterr().out
  assert said.count('\n') == 1 and os.strerror(errno.ENOLCK) in said


def test_the_target_of_a_planted_link_is_not_written(workdir, tmp_path):
  workdir.path.mkdir()
  (tmp_path / 'precious').write_text('x')
  for name in ('.lock', '.run.json.tmp'):
    (workdir.path / name).symlink_to(tmp_path / 'precious')
  with workdir.claimed():
    pass
  assert (tmp_path / 'precious').read_text() == 'x' and not workdir.run.is_symlink()


def test_a_home_directory_is_that_of_the_user(tmp_path, monkeypatch):
  """The shell does not expand `--workdir=~/out`."""
  monkeypatch.setenv('HOME', str(tmp_path))
  assert Workdir('~/out', {}).path == tmp_path / 'out'
