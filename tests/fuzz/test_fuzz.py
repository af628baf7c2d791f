"""A few hundred damaged inputs of every kind, and the fuzzer itself on faults that are planted."""

import json
import os
import random
import subprocess
import sys

import pytest

from tests.fuzz.campaign import OUT, ROOT
from tests.fuzz.mutations import damage_bytes, damage_json, json_text

CASES = 400
SEED = os.environ.get('ADAPT_JAX_TEST_SEED', '0')  # another one damages in other ways


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, '-m', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)


def test_damaged_inputs_are_read_as_before_or_refused():
  done = fuzz('tests.fuzz', f'--cases={CASES}', f'--seed={SEED}', '--jobs=2')
  assert done.returncode == 0, f'{done.stdout}{done.stderr}\nthe inputs are in {ROOT / OUT}'


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  out = tmp_path_factory.mktemp('planted')
  done = fuzz('tests.fuzz.planted', str(out))
  assert done.returncode == 0, done.stdout + done.stderr
  return json.loads(done.stdout.splitlines()[-1]), out, done.stdout


FOUND = {
  'crash': 'KeyError',
  'hang': 'no end within 5 s',
  'death': 'Fatal Python error: Aborted',
  'memory': 'MemoryError',
  'more memory': 'more memory than usual',
  'value': 'another value without a reason: value: as it was became other',
  'left': "left behind: ['new']",
  'temporary': 'temporary files left behind',
  'changed': "changed or left behind: ['fault']",
  'two lines': 'not one plain line',
  'escape': 'not one plain line',
  'nothing said': 'not one plain line',
}


@pytest.mark.parametrize('fault', FOUND)
def test_a_planted_fault_is_found(planted, fault):
  result, detail = planted[0][fault]
  assert result == 'failed' and FOUND[fault] in detail


@pytest.mark.parametrize('fault', ['same', 'refused', 'harmless'])
def test_what_is_allowed_is_no_failure(planted, fault):
  assert planted[0][fault][0] == fault


def test_a_failure_is_kept_with_the_command_that_repeats_it(planted):
  _, out, printed = planted
  kept = sorted(out.iterdir())
  assert kept and all((path / 'input/fault').read_text() in (path / 'why.txt').read_text() for path in kept)
  assert all(f'-m tests.fuzz {path}' in (path / 'why.txt').read_text() for path in kept)
  assert sum(f'{path}: failed: ' in printed for path in kept) == 3


def test_equal_seeds_damage_equally():
  tree = {'a': [1, 2, {'b': 'c'}], 'd': None, 'e': 1.5}
  for seed in range(50):
    one, two = (
      (
        json_text(damage_json(json.loads(json.dumps(tree)), random.Random(seed))),
        damage_bytes(b'0123456789' * 9, random.Random(seed)),
      )
      for _ in range(2)
    )
    assert one == two
