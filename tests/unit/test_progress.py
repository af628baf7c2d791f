"""What a person sees of long work, on a terminal and in a log."""

import io
import re
import time
import types

import pytest

from adapt_jax.machine import processes, progress
from adapt_jax.machine.progress import Progress, phase


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def terminal(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(progress, 'sys', types.SimpleNamespace(stderr=terminal))
  return terminal


@pytest.fixture
def quick(monkeypatch):
  """A hundredth of the times between two signs of life."""
  monkeypatch.setattr(progress, '_TICK_SECONDS', 0.01)
  monkeypatch.setattr(progress, '_LINE_SECONDS', 0.1)
  monkeypatch.setattr(progress, '_SAME_SECONDS', 0.3)


def wait_for(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_silent_work_moves_on_a_terminal(terminal, quick):
  """One long call without an update, such as a scoring pass: the line is drawn again and again."""
  with Progress('prune', 100, 'parameters removed'), phase('scoring'):
    wait_for(lambda: len(re.findall(r'prune:[^\r]*scoring', terminal.getvalue())) > 5)
  with phase('reading the model'):
    wait_for(lambda: terminal.getvalue().count('reading the model') > 5)
  assert terminal.getvalue().split('\r')[-1].strip() == ''


def test_silent_work_moves_in_a_log_but_not_too_often(capfd, quick):
  start, lines = time.monotonic(), []

  def three() -> bool:
    lines.extend(capfd.readouterr().out.splitlines())
    return len(lines) >= 3

  with Progress('prune', 100, 'steps') as bar:
    bar.update(5, loss='2.5')
    with phase('scoring'):
      wait_for(three)
  assert all(re.match(r'prune: 5/100 steps, scoring, 00:0\d, .* left$', line) for line in lines)
  assert len(lines) <= (time.monotonic() - start) / 0.3 + 1  # nothing but the time has changed
  assert re.match(r'prune: 5 steps, loss 2\.5, in 00:0\d$', capfd.readouterr().out)  # the last


def test_a_log_has_a_line_for_each_new_count(capfd, quick, monkeypatch):
  monkeypatch.setattr(progress, '_SAME_SECONDS', 3600)
  lines = []

  def said(count: int) -> bool:
    lines.extend(capfd.readouterr().out.splitlines())
    return bool(lines) and f'{count}/100 steps' in lines[-1]

  with Progress('prune', 100, 'steps') as bar:
    wait_for(lambda: said(0))
    assert re.fullmatch(r'prune: 0/100 steps, 00:0\d', lines[-1])  # neither rate nor time left
    for count in range(1, 4):
      bar.update(1)
      wait_for(lambda count=count: said(count))


def test_a_part_shows_its_share_and_then_the_time_left(terminal):
  with Progress('prune', 100, 'steps'), phase('scoring', 4) as tick:
    tick(1)
    assert 'prune: 0/100 steps, scoring 25 %, 00:00' in terminal.getvalue()
    tick(1)
    assert 'prune: 0/100 steps, scoring 50 %, 00:00 left, 00:00' in terminal.getvalue()
  with phase('compensating', 2) as tick:
    tick(1)
    assert 'compensating: 00:00, 50 %' in terminal.getvalue()


def test_work_that_ends_leaves_its_numbers_and_work_that_fails_where_it_was(terminal):
  with Progress('prune', 1000, 'steps') as bar:
    bar.update(60, perplexity='17.95')
  assert 'prune: 60 steps, perplexity 17.95, in 00:00' in terminal.getvalue().split('\r')[-1]
  with pytest.raises(ValueError, match='stop'), Progress('prune', 1000, 'steps') as bar:
    bar.update(60)
    raise ValueError('stop')
  assert 'prune: 60/1000 steps' in terminal.getvalue().split('\r')[-1]


def test_a_terminal_of_80_columns_shows_the_values(terminal):
  with Progress('stage 1 recovered: evaluate encyclopedia', 91, 'windows') as bar:
    bar.update(45, perplexity='1234.56')
    bar.show('')
    drawn = terminal.getvalue().split('\r')[-1]
  assert drawn[:80].endswith('45/91 windows, perplexity 1234.56, 00:')


def test_a_library_is_silent(capfd, terminal, quick):
  with processes.silent(), Progress('prune', 10, 'steps') as bar:
    bar.update(10)
    processes.say('a line')
    with phase('scoring'):
      time.sleep(0.2)
  assert capfd.readouterr().out == '' and terminal.getvalue() == ''


def test_a_line_stands_above_the_bar(terminal, monkeypatch):
  monkeypatch.setattr(processes, 'sys', types.SimpleNamespace(stdout=terminal))
  with Progress('recover', 10, 'steps') as bar:
    bar.update(5)
    processes.say('the run will take long')
  lines = re.split(r'[\r\n]', terminal.getvalue())
  assert 'the run will take long' in [line.strip('\x1b[A ') for line in lines]
