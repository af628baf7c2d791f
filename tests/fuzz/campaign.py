"""A campaign: many cases of all kinds in parallel, progress, and the reproducers of failures."""

import argparse
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
OUT = pathlib.Path('out/fuzz')
_EACH = 3  # reproducers that are kept of failures at one place
_CLEAR = '\r\x1b[K'  # of a terminal: the line is written anew
_PATIENCE = 10  # seconds beyond its own limit after which a process is killed


class _Running(NamedTuple):
  kind: str
  index: int | None
  room: pathlib.Path
  started: float


def load_kinds() -> dict:
  """All kinds by name. The imports take seconds, and every case inherits them."""
  os.environ |= {'TOKENIZERS_PARALLELISM': 'false', 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'TRANSFORMERS_VERBOSITY': 'error'}
  from tests.fuzz import kinds

  return {kind.name: kind for kind in kinds.KINDS}


class Campaign:
  """Runs cases of these kinds in a temporary directory, `jobs` at once."""

  def __init__(self, kinds: dict, seed: int, jobs: int, room: pathlib.Path):
    self.kinds, self.seed, self.jobs, self.room = kinds, seed, jobs, room
    self.wanted: dict[str, dict[str, str]] = {}
    self.usual: dict[str, int] = {}

  def base(self, name: str) -> pathlib.Path:
    return self.room / 'bases' / name

  def prepare(self, names: list[str]) -> None:
    """Writes the undamaged inputs and reads them, each in a process of its own."""
    from tests.fuzz import cases

    for name in names:
      self.base(name).mkdir(parents=True)
      if not (pid := os.fork()):
        code = 1
        try:
          self.kinds[name].make(self.base(name))
          code = 0
        finally:
          os._exit(code)
      if os.waitpid(pid, 0)[1]:
        raise SystemExit(f'the undamaged input of {name} cannot be written')
      self.kinds[name].warm(self.base(name))
      room = self.room / f'{name}-undamaged'
      pid = cases.start(self.kinds[name], 0, None, self.base(name), room, {})
      _, status, usage = os.wait4(pid, 0)
      outcome = cases.ended(room, name, -1, status, 0, 0)
      if outcome.result != 'same':
        raise SystemExit(f'the undamaged input of {name} is not read: {outcome.detail}')
      self.wanted[name], self.usual[name] = json.loads(outcome.detail), _bytes(usage)

  def run(self, todo: Iterator[tuple[str, int]]) -> Iterator:
    """Yields the outcome of each case as it ends."""
    from tests.fuzz import cases

    running: dict[int, _Running] = {}
    more = True
    try:
      while more or running:
        while more and len(running) < self.jobs:
          if (case := next(todo, None)) is None:
            more = False
            break
          name, index = case
          room = self.room / f'{name}-{index}'
          kind, wanted = self.kinds[name], self.wanted[name]
          pid = cases.start(kind, self.seed, index, self.base(name), room, wanted)
          running[pid] = _Running(name, index, room, time.monotonic())
        found = [(pid, case, *os.wait4(pid, os.WNOHANG)[1:]) for pid, case in running.items()]
        ended = [of for of in found if of[3].ru_maxrss]
        for pid, *_ in ended:
          del running[pid]
        for pid, case in running.items():
          if time.monotonic() - case.started > cases.SECONDS + _PATIENCE:
            os.kill(pid, signal.SIGKILL)
        for _, case, status, usage in ended:
          yield cases.ended(case.room, case.kind, case.index, status, _bytes(usage), self.usual[case.kind])
          shutil.rmtree(case.room)
        if not ended:
          time.sleep(0.002)
    finally:
      for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

  def keep(self, outcome, out: pathlib.Path) -> pathlib.Path:
    """Writes a failed case: the input, the reason and the command that repeats it; returns the directory."""
    from tests.fuzz import cases

    place = out / f'{outcome.kind}-{self.seed}-{outcome.index}'
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    kind, base = self.kinds[outcome.kind], self.base(outcome.kind)
    if not (pid := os.fork()):
      try:
        cases.prepare_input(kind, self.seed, outcome.index, base, place / 'input')
      finally:
        os._exit(0)
    os.waitpid(pid, 0)
    text = f'{outcome.done}\n\n{outcome.detail}\n\nRepeat it: {sys.executable} -m tests.fuzz {place}\n'
    (place / 'why.txt').write_text(text, encoding='utf-8', errors='backslashreplace')
    return place


def _bytes(usage: resource.struct_rusage) -> int:
  return usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def reason(detail: str) -> str:
  """The line of a failure that says most: the error of a traceback, or the first one."""
  errors = [line for line in detail.splitlines() if re.match(r'[\w.]+(Error|Exception|Exit)\b', line)]
  return (errors or detail.strip().splitlines()[:1] or [''])[-1][:200]


def signature(detail: str) -> str:
  """What failures at one place have in common: the last line of our code in a traceback, and the reason."""
  lines = re.findall(r'File ".*?/((?:adapt_jax|models)/\S+)", line (\d+)', detail)
  if 'most recent call first' in detail:  # written by faulthandler
    lines = lines[::-1]
  where = f'{lines[-1][0]}:{lines[-1][1]} ' if lines else ''
  return where + re.sub(r'[\d\'"].*', '', reason(detail))[:100]


def shares(kinds: dict, count: int) -> Counter:
  """How many cases each kind gets; one at least."""
  whole = sum(kind.share for kind in kinds.values())
  return Counter({name: max(1, round(count * kind.share / whole)) for name, kind in kinds.items()})


def interleaved(counts: Counter, first: int) -> Iterator[tuple[str, int]]:
  """All cases, so that each kind is spread over the whole campaign."""
  places = [((i + 0.5) / count, name, first + i) for name, count in counts.items() for i in range(count)]
  return ((name, index) for _, name, index in sorted(places))


def main(argv: list[str]) -> int:
  """The exit code: 0 if no case failed."""
  parser = argparse.ArgumentParser(prog='python -m tests.fuzz', description=__doc__)
  parser.add_argument('again', nargs='*', type=pathlib.Path, help='directories of failed cases to repeat')
  parser.add_argument('--cases', type=int, default=400)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--first', type=int, default=0, help='index of the first case of each kind')
  parser.add_argument('--kind', action='append', help='only this kind; may be repeated')
  parser.add_argument('--jobs', type=int, default=os.cpu_count())
  parser.add_argument('--out', type=pathlib.Path, default=OUT)
  given = parser.parse_args(argv)
  print(f'{given.cases:,} cases with seed {given.seed}: importing', flush=True)
  kinds = load_kinds()
  if unknown := set(given.kind or ()) - kinds.keys():
    parser.error(f'no kind {sorted(unknown)}: {", ".join(kinds)}')
  with tempfile.TemporaryDirectory(prefix='fuzz-') as room:
    campaign = Campaign(kinds, given.seed, given.jobs, pathlib.Path(room))
    if given.again:
      return again(campaign, given.again)
    wanted = {name: kind for name, kind in kinds.items() if not given.kind or name in given.kind}
    campaign.prepare(list(wanted))
    return _campaign(campaign, shares(wanted, given.cases), given.first, given.out)


def again(campaign: Campaign, places: list[pathlib.Path]) -> int:
  """Reads kept inputs again and prints how that ends."""
  from tests.fuzz import cases

  failed = 0
  for place in places:
    name = place.name.rsplit('-', 2)[0]
    if name not in campaign.wanted:
      campaign.prepare([name])
    kind, room = campaign.kinds[name], campaign.room / place.name
    kept = _Kept(kind, place.resolve() / 'input')
    status, usage = os.wait4(cases.start(kept, 0, 0, campaign.base(name), room, campaign.wanted[name]), 0)[1:]
    outcome = cases.ended(room, name, 0, status, _bytes(usage), campaign.usual[name])
    print(f'{place}: {outcome.result}: {outcome.detail}', flush=True)
    failed += outcome.result == 'failed'
  return int(failed > 0)


class _Kept:
  """A kind whose damaged input is the one that was kept."""

  def __init__(self, kind, place: pathlib.Path):
    self._kind, self._place = kind, place
    self.name, self.writes = kind.name, kind.writes
    self.observe, self.harmless = kind.observe, kind.harmless

  def damage(self, place: pathlib.Path, rng) -> str:
    shutil.rmtree(place)
    shutil.copytree(self._place, place, symlinks=True)
    return 'kept'


def _campaign(campaign: Campaign, counts: Counter, first: int, out: pathlib.Path) -> int:
  total, due, terminal = counts.total(), 0.0, sys.stdout.isatty()
  results: dict[str, Counter] = {name: Counter() for name in counts}
  failures: dict[str, list[pathlib.Path]] = {}
  numbers: Counter = Counter()
  for done, outcome in enumerate(campaign.run(interleaved(counts, first)), 1):
    results[outcome.kind][outcome.result] += 1
    if outcome.result == 'failed':
      place = f'{outcome.kind}: {signature(outcome.detail)}'
      numbers[place] += 1
      kept = failures.setdefault(place, [])
      if len(kept) < _EACH:
        kept.append(campaign.keep(outcome, out))
      if numbers[place] == 1:
        print(f'{_CLEAR * terminal}failed: {kept[0]}: {outcome.done}: {reason(outcome.detail)}', flush=True)
    if time.monotonic() > due or done == total:
      due = time.monotonic() + (1 if terminal else 10)
      line = f'{done:,} of {total:,} cases, {numbers.total():,} failed'
      print(
        f'{_CLEAR}{line}' if terminal else line, end='' if terminal and done < total else '\n', flush=True
      )
  for name, found in results.items():
    parts = ', '.join(f'{found[result]:,} {result}' for result in ('same', 'refused', 'harmless', 'failed'))
    print(f'{name:12} {found.total():6,} cases: {parts}')
  for place, kept in failures.items():
    print(f'FAILED {numbers[place]:,} times: {place}\n  ' + '\n  '.join(str(path) for path in kept))
  if failures:
    print(f'repeat one: {sys.executable} -m tests.fuzz {next(iter(failures.values()))[0]}')
  return int(bool(failures))
