"""One case of the fuzzer: an input damaged by chance, read in a process of its own, and judged.

A case is determined by its kind, the seed and its index. What it may end in: the values of the undamaged
input; a refusal (an `InputError` of one line); or other values that the kind lists as harmless, because the
damaged file itself says them. Anything else is a failure: another exception, no end, much memory, other
values, files left behind.
"""

import faulthandler
import fnmatch
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import unicodedata
from typing import Any, NamedTuple, NoReturn

from adapt_jax.models.errors import InputError

SECONDS = 30  # a case takes a twentieth of one; other programs may use the machine
GROWTH = 1280 * 2**20  # bytes of memory beyond those for the undamaged input; a chat template may have most
_ADDRESSES = 4 * 2**30  # more of them and an allocation fails, so that the machine stays usable
_LONGEST = 20_000  # characters of a refusal
Values = dict[str, str]


class Kind:
  """A kind of input. Subclasses write an undamaged one, damage it and read it with the program.

  name: of the kind. share: its part of all cases. writes: patterns of the files that reading may leave.
  """

  name = ''
  share = 1.0
  writes: tuple[str, ...] = ()

  def make(self, place: pathlib.Path) -> None:
    """Writes the undamaged input into an empty directory."""
    raise NotImplementedError

  def warm(self, base: pathlib.Path) -> None:
    """Does once, in the process that forks the cases, what each of them would do again; without devices."""

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    """Damages the input in a directory; returns what was done, in words."""
    raise NotImplementedError

  def observe(self, place: pathlib.Path) -> Values:
    """Everything that the program reads from the input, by name."""
    raise NotImplementedError

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """The values that may differ, by the patterns of their names: the expected value, or '' for any."""
    return {}


class Outcome(NamedTuple):
  """How a case ended: same, refused, harmless or failed; the refusal, the difference or the reason."""

  kind: str
  index: int
  result: str
  detail: str
  done: str = ''  # to the input


def digest(*parts: Any) -> str:
  """A short digest of bytes, or of what represents other values."""
  found = hashlib.sha256()
  for part in parts:
    found.update(part if isinstance(part, bytes) else repr(part).encode('utf-8', 'backslashreplace'))
  return found.hexdigest()[:16]


def prepare_input(kind: Kind, seed: int, index: int, base: pathlib.Path, place: pathlib.Path) -> str:
  """Copies the undamaged input to `place` and damages it, as the seed and the index say."""
  shutil.copytree(base, place, symlinks=True)
  return kind.damage(place, random.Random(f'{seed}/{kind.name}/{index}'))


def judge(kind: Kind, base: pathlib.Path, place: pathlib.Path, wanted: Values) -> tuple[str, str]:
  """Reads the input at `place` and says how that ended: (result, detail)."""
  before = _listing(place)
  try:
    found = kind.observe(place)
  except InputError as error:
    return _judge_refusal(str(error), kind, before, _listing(place))
  except MemoryError:
    return 'failed', f'more than {_ADDRESSES >> 20} MB of memory\n{traceback.format_exc()}'
  except BaseException:  # whatever it is, it is the finding
    return 'failed', traceback.format_exc()
  if left := _left(kind, before, _listing(place)):
    return 'failed', f'files changed or left behind: {left}'
  different = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
  if not different:
    return 'same', ''
  listed = kind.harmless(place, base)
  for name in sorted(different):
    expected = [value for pattern, value in listed.items() if fnmatch.fnmatchcase(name, pattern)]
    if not any(value in ('', found.get(name)) for value in expected):
      return 'failed', f'another value without a reason: {name}: {wanted.get(name)} became {found.get(name)}'
  return 'harmless', ', '.join(sorted(different))


def _judge_refusal(
  message: str, kind: Kind, before: dict[str, str], after: dict[str, str]
) -> tuple[str, str]:
  if left := _left(kind, before, after):
    return 'failed', f'files changed or left behind: {left}, after: {message}'
  control = any(unicodedata.category(c) == 'Cc' for c in message)
  if len(message.splitlines()) != 1 or control or not message.strip() or len(message) > _LONGEST:
    return 'failed', f'a refusal that is not one plain line of text: {message[:500]!r}'
  return 'refused', message


def _listing(place: pathlib.Path) -> dict[str, str]:
  """Every file below `place` with a digest of its content, and other things with their kind."""
  found = {}
  for path in sorted(place.rglob('*')):
    if path.is_symlink() or not path.is_file():
      state = path.lstat()
      found[str(path.relative_to(place))] = '' if path.is_dir() else f'{state.st_mode}'
    else:
      found[str(path.relative_to(place))] = digest(path.read_bytes())
  return found


def _left(kind: Kind, before: dict[str, str], after: dict[str, str]) -> list[str]:
  changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
  return [name for name in changed if not any(fnmatch.fnmatchcase(name, p) for p in kind.writes)]


def start(
  kind: Kind, seed: int, index: int | None, base: pathlib.Path, room: pathlib.Path, wanted: Values
) -> int:
  """Forks a process that runs a case in the empty directory `room`, and returns its id.

  It writes `outcome.json` there. With `index` None it reads the undamaged input.
  """
  room.mkdir(parents=True)
  sys.stdout.flush()
  sys.stderr.flush()
  if pid := os.fork():
    return pid
  _run(kind, seed, index, base, room, wanted)


def _run(
  kind: Kind, seed: int, index: int | None, base: pathlib.Path, room: pathlib.Path, wanted: Values
) -> NoReturn:
  """The process of a case."""
  code = 1
  try:
    with open(room / 'printed.txt', 'w', encoding='utf-8', errors='backslashreplace') as printed:
      _confine(room, printed)
      place, done = room / 'input', ''
      if index is None:
        shutil.copytree(base, place, symlinks=True)
        result, detail = 'same', json.dumps(kind.observe(place))
      else:
        done = prepare_input(kind, seed, index, base, place)
        (room / 'done.txt').write_text(done, errors='backslashreplace')
        result, detail = judge(kind, base, place, wanted)
      if left := [path.name for path in (room / 'tmp').iterdir()]:
        result, detail = 'failed', f'temporary files left behind: {left}'
      (room / 'outcome.json').write_text(json.dumps([kind.name, index, result, detail, done]))
      code = 0
  except BaseException:  # of the fuzzer itself: nobody else would see it
    (room / 'printed.txt').write_text(traceback.format_exc(), errors='backslashreplace')
  finally:
    os._exit(code)


def _confine(room: pathlib.Path, printed: Any) -> None:
  """Limits time and memory; other programs, the hub and the user's files are out of reach."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  for number in (1, 2):
    os.dup2(printed.fileno(), number)
  faulthandler.enable(printed)
  faulthandler.dump_traceback_later(SECONDS, exit=True, file=printed)
  for name in ('home', 'tmp'):
    (room / name).mkdir()
  os.environ |= {
    'HOME': str(room / 'home'),
    'XDG_CACHE_HOME': str(room / 'home'),
    'TMPDIR': str(room / 'tmp'),
  }
  tempfile.tempdir = None
  used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) if os.path.exists('/proc/self') else 0
  if used:
    most = used * resource.getpagesize() + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

  if bounded := sys.modules.get('adapt_jax.machine.bounded'):  # gives chat templates 10 s of computing
    bounded.SECONDS = 2  # type: ignore[attr-defined]

  def unknown(*_: Any, **__: Any) -> NoReturn:
    raise OSError('no network here')

  socket.getaddrinfo = unknown


def ended(room: pathlib.Path, kind: str, index: int, status: int, peak: int, usual: int) -> Outcome:
  """The outcome of a case whose process has ended; `peak`, `usual`: bytes of memory, and of the undamaged."""
  try:
    outcome = Outcome(*json.loads((room / 'outcome.json').read_text()))
  except (OSError, ValueError):
    printed = (room / 'printed.txt').read_text(errors='replace')[-4000:]
    why = f'no end within {SECONDS} s' if 'Timeout' in printed else f'the process died with status {status}'
    done = room / 'done.txt'
    return Outcome(kind, index, 'failed', f'{why}\n{printed}', done.read_text() if done.exists() else '')
  if outcome.result != 'failed' and peak > usual + GROWTH:
    more = (peak - usual) >> 20
    return outcome._replace(
      result='failed', detail=f'{more} MB more memory than usual, then: {outcome.detail}'
    )
  return outcome
