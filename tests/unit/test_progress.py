"""What a person sees of long work, on a terminal and in a log."""

import functools
import io
import re
import time
import types

import pytest
from tqdm import tqdm

from adapt_jax.machine import processes, progress
from adapt_jax.machine.progress import Progress, phase, prefixed


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def terminal(monkeypatch):
  found = Terminal()
  monkeypatch.setattr(progress, 'sys', types.SimpleNamespace(stderr=found))
  return found


@pytest.fixture
def quick(monkeypatch):
  """A hundredth of the times between two signs of life."""
  monkeypatch.setattr(progress, '_TICK_SECONDS', 0.01)
  monkeypatch.setattr(progress, '_LINE_SECONDS', 0.1)


def wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_silent_work_moves_on_a_terminal(terminal, quick):
  """One long call without an update, such as a scoring pass: the line is drawn again and again."""
  with Progress('prune', 100, 'parameters removed'), phase('scoring', counts=True):
    wait_for(lambda: len(re.findall(r'prune:[^\r]*scoring', terminal.getvalue())) > 5)


def test_silent_work_moves_in_a_log(capfd, quick):
  start, lines = time.monotonic(), []

  def three() -> bool:
    lines.extend(capfd.readouterr().out.splitlines())
    return len(lines) >= 3

  with Progress('prune', 100, 'parameters removed'), phase('scoring', counts=True):
    wait_for(three)
  assert all(re.fullmatch(r'prune: 0/100 parameters removed scoring for \d+ s', line) for line in lines)
  assert len(lines) <= (time.monotonic() - start) / 0.1 + 2  # no more often than it should


def test_short_work_without_a_count_leaves_no_line(capfd, terminal):
  with phase('compacting'):
    pass
  assert capfd.readouterr().out == ''


def test_whole_things_are_counted_whole_and_tokens_by_size(terminal):
  with Progress('evaluate', 48, 'windows') as bar:
    bar.update(48)
  with Progress('recover', 40_000, 'tokens') as bar:
    bar.update(40_000)
  assert ' 48/48 ' in terminal.getvalue() and ' 40.0k/40.0k ' in terminal.getvalue()


def test_a_bar_that_had_less_to_do_ends_full(terminal):
  with Progress('prune', 1000, 'steps') as bar:
    bar.update(60)
  assert '100%' in terminal.getvalue().split('\r')[-1]


def test_a_bar_that_fails_stays_where_it_was(terminal):
  with pytest.raises(ValueError, match='stop'), Progress('prune', 1000, 'steps') as bar:
    bar.update(60)
    raise ValueError('stop')
  assert '6%' in terminal.getvalue().split('\r')[-1]


def test_compiling_is_named_and_kept_out_of_the_rate(capfd, monkeypatch):
  monkeypatch.setattr(progress, '_LINE_SECONDS', 0.0)
  with Progress('evaluate', 2, 'windows') as bar:
    with phase('compiling evaluation'):
      time.sleep(1)
    start = time.monotonic()
    time.sleep(0.05)
    bar.update(2)
    seconds = time.monotonic() - start
  last = capfd.readouterr().out.splitlines()[-1]
  assert float(re.search(r'([\d.]+)/s', last)[1]) > 1.9 / (seconds + 0.1)  # and not in a second more


@pytest.fixture
def clock(monkeypatch):
  """The time that progress sees, in a list of one; each update has a line, and nothing else."""
  now = [0.0]
  monkeypatch.setattr(progress, 'time', types.SimpleNamespace(monotonic=lambda: now[0]))
  monkeypatch.setattr(progress, '_TICK_SECONDS', 3600.0)
  monkeypatch.setattr(progress, '_LINE_SECONDS', 0.0)
  return now


def test_the_rate_stands_still_while_a_phase_goes_on_that_does_not_count(capfd, clock):
  def later(seconds):
    clock[0] += seconds
    bar.update(0)
    return capfd.readouterr().out.splitlines()[-1].removeprefix('recover: ')

  with Progress('recover', 100, 'units') as bar:
    bar.update(10)
    before = '10/100 units 1.0/s 90 s left'
    assert later(10) == before
    with phase('saving'):
      assert later(30) == f'{before} saving for 30 s'
      with phase('compiling'):
        assert later(20) == f'{before} compiling for 20 s'
      with phase('scoring', counts=True):
        assert later(40) == f'{before} scoring for 40 s'
      assert later(5) == f'{before} saving for 95 s'
    assert later(0) == before
    half = '10/100 units 0.5/s 180 s left'
    with phase('scoring', counts=True):
      assert later(10) == f'{half} scoring for 10 s'
      with phase('compiling'):
        assert later(7) == f'{half} compiling for 7 s'
      assert later(0) == f'{half} scoring for 17 s'
    assert later(0) == half


def test_work_without_a_count_shows_all_its_time(capfd, clock):
  with Progress('reading', None) as bar:
    for _ in range(2):
      with bar.phase('compiling', counts=False):
        clock[0] += 10
        bar.update(0)
    bar.update(0)
  lines = capfd.readouterr().out.splitlines()
  assert lines == ['reading: 10 s compiling', 'reading: 20 s compiling', 'reading: 20 s']


def test_lines_of_a_log_are_the_first_the_last_and_those_after_ten_seconds(capfd):
  with Progress('recover', 300, 'tokens') as bar:
    for _ in range(3):
      bar.update(100, loss='2.5')
  lines = capfd.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines] == ['100/300', '300/300'] and lines[0].endswith('loss 2.5')


def test_a_cell_of_a_grid_is_in_the_title(capfd):
  with prefixed('2/5'), Progress('stage 1 recover', 10, 'tokens') as bar:
    bar.update(10)
  assert capfd.readouterr().out.startswith('2/5: stage 1 recover: 10/10')


def test_a_library_is_silent(capfd, terminal, quick):
  with processes.silent(), Progress('prune', 10, 'steps') as bar:
    bar.update(10)
    processes.say('a line')
    with phase('scoring'):
      time.sleep(0.2)
  assert capfd.readouterr().out == '' and terminal.getvalue() == ''


def test_a_terminal_without_bars_gets_none(terminal, monkeypatch):
  monkeypatch.setattr(progress, 'tqdm', functools.partial(tqdm, disable=True))  # as TQDM_DISABLE does
  with Progress('prune', 10, 'steps') as bar, phase('compiling scoring'):
    bar.update(1)
  assert 'prune' not in terminal.getvalue()


def test_a_line_stands_above_the_bar(terminal, monkeypatch):
  monkeypatch.setattr(processes, 'sys', types.SimpleNamespace(stdout=terminal))
  with Progress('recover', 10, 'steps') as bar:
    bar.update(5)
    processes.say('the run will take long')
  lines = re.split(r'[\r\n]', terminal.getvalue())
  assert 'the run will take long' in [line.strip('\x1b[A ') for line in lines]
