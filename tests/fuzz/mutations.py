"""Damage by chance to bytes, to JSON and to whole files; equal generators damage equally."""

import json
import os
import pathlib
import random
import shutil
import socket
from typing import Any

DEEP = '\ue000deep'  # stands for JSON that is nested 100,000 times, which json.dumps itself cannot write
_WORDS = (
  '',
  'x',
  '0',
  '-1',
  '\0',
  'a\nb',
  '\x1b[2J',
  '\u2028',
  '\ud800',
  '🙂',
  'é' * 300,
  'x' * 70_000,
  '../x',
)
_WORDS += ('%s{0}', '{{ 1 // 0 }}', '~nouser', '/dev/zero', 'NaN', 'null', '<b>|`*_', 'config.json')
_NUMBERS = (
  0,
  1,
  -1,
  2,
  3,
  7,
  255,
  2**16,
  2**31 - 1,
  2**31,
  -(2**31),
  2**32,
  2**53 + 1,
  2**63,
  2**64,
  10**400,
)
_DECIMALS = (0.5, -0.0, 1e-300, 1e300, 5e-324, float('nan'), float('inf'), float('-inf'))
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {'': None}, [1, 'a'], DEEP)


# Chat templates are programs of others: some do not end, fill the memory or fail in their own way.
_HOSTILE = (
  '{% for i in range(10**9) %}x{% endfor %}', "{{ 'x' * 3000000000 }}", '{{ [0] * 10**9 }}',
  '{{ 10**10**8 }}', '{{ 1 // 0 }}', '{{ messages[99].content }}', '{{ messages[0].x.y }}',
  "{{ ''.__class__.__mro__ }}", '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
  "{% include 'config.json' %}", '{{ lipsum(n=10**6) }}', "{{ '%d' % 'x' }}", "{{ '{0}'.format() }}",
  '{{ raise_exception(5) }}', "{{ raise_exception('a\\nb') }}", "{{ strftime_now('%') }}",
  "{{ 'x'.encode('ascii').decode('no') }}", "{{ messages | tojson(indent='x') }}", '{% set messages = 5 %}',
  '{{ messages.append(1) }}', '{{ messages[0].update(content=5) }}', '{{ cycler() }}',
  "{{ 'x' | center(3000000000) }}", "{{ '\\ud800' }}", '{{ 2.5 | int(base=99) }}', '{{ [[]] | sum }}',
  '{{ undefined }}', '{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}',
  '{{ messages | batch(0) | list }}', '\0', '{{ eos_token * -1 }}', "{{ ('a' * 10**8) * 10**3 }}",
  '{{ messages | groupby(5) }}', '{' * 5000, '{{' + '(' * 5000,
)  # fmt: skip


def damage_template(text: str, rng: random.Random) -> str:
  """A chat template with something hostile in it, often at the place of its beginning."""
  at = rng.choice([0, len(text), rng.randrange(len(text))])
  return text[:at] + rng.choice(_HOSTILE) + text[at:]


def odd_value(rng: random.Random, old: Any = None) -> Any:
  """A value for the place of `old`: near it, of another type, or far outside of what is usual."""
  if isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 1e300 and rng.random() < 0.4:
    return rng.choice([old + 1, old - 1, -old, 2 * old, old / 2, old * 10**6, str(old), [old], float(old)])
  if isinstance(old, str) and rng.random() < 0.4:
    return rng.choice(
      [old[:-1], old + old, old.upper(), old[::-1], old + ' ', old + '\n', [old], old + '\ud800']
    )
  return rng.choice(rng.choice([_WORDS, _NUMBERS, _NUMBERS, _DECIMALS, _OTHERS]))


def _places(tree: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
  """(container, key) of everything in a tree of JSON."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
  for key, value in items:
    found.append((tree, key))
    _places(value, found)
  return found


def damage_json(tree: Any, rng: random.Random) -> Any:
  """One to three changed, removed, renamed, exchanged or repeated values; returns the tree."""
  for _ in range(rng.choice([1, 1, 1, 2, 3])):
    if not (places := _places(tree, [])):
      return odd_value(rng, tree)
    at_top = [place for place in places if place[0] is tree]
    holder, key = rng.choice(at_top if rng.random() < 0.5 else places)
    act = rng.choice(['set', 'set', 'set', 'remove', 'rename', 'exchange', 'add'])
    if act == 'set':
      holder[key] = odd_value(rng, holder[key])
    elif act == 'exchange':
      other, there = rng.choice(places)
      holder[key], other[there] = other[there], holder[key]
      if _endless(tree):
        holder[key] = None
    elif isinstance(holder, list):
      if act == 'remove':
        del holder[key]
      else:
        holder.insert(key, odd_value(rng, holder[key]))
    else:
      value = holder.pop(key) if act != 'add' else odd_value(rng)
      if act != 'remove':
        holder[rng.choice([str(key)[:-1], f'{key}x', *_WORDS])] = value
  return odd_value(rng, tree) if rng.random() < 0.02 else tree


def _endless(tree: Any) -> bool:
  """Whether an exchange has put a value into itself."""
  try:
    json.dumps(tree)
  except ValueError:
    return True
  return False


def json_text(tree: Any) -> str:
  """The tree as JSON, with the nesting that `DEEP` stands for."""
  return json.dumps(tree).replace(json.dumps(DEEP), '[' * 100_000 + ']' * 100_000)


def damage_bytes(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
  """One to three changes, all of them in the first `within` bytes if given; or a truncation."""
  found = bytearray(data)
  for _ in range(rng.choice([1, 1, 2, 3])):
    end = max(1, min(len(found), within or len(found)))
    at, size = rng.randrange(end), rng.choice([1, 1, 2, 4, 8, 64, 1000])
    act = rng.choice(['bit', 'bit', 'byte', 'remove', 'insert', 'repeat', 'fill', 'truncate'])
    if act == 'bit' and found:
      found[at] ^= 1 << rng.randrange(8)
    elif act == 'byte' and found:
      found[at] = rng.choice([0, 10, 34, 44, 91, 123, 127, 128, 255, rng.randrange(256)])
    elif act == 'remove':
      del found[at : at + size]
    elif act == 'insert':
      found[at:at] = rng.choice([rng.randbytes(size), b'\0' * size, b'\xff' * size, b'[' * size])
    elif act == 'repeat':
      found[at:at] = found[at : at + size]
    elif act == 'fill':
      found[at : at + size] = bytes([rng.choice([0, 32, 255])]) * len(found[at : at + size])
    elif act == 'truncate':
      del found[rng.choice([at, rng.randrange(len(found) + 1)]) :]
  return bytes(found)


def replace_file(path: pathlib.Path, rng: random.Random) -> str:
  """Puts something else in the place of a file: nothing, a link, a device, another file, another encoding."""
  data = path.read_bytes()
  kinds = ['absent', 'empty', 'directory', 'loop', 'dangling', 'fifo', 'socket', 'null', 'zero']
  kinds += ['bom', 'utf-16', 'crlf', 'twice', 'other', 'moved']
  kind = rng.choice(kinds)
  others = [other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path]
  path.unlink()
  if kind == 'empty':
    path.touch()
  elif kind == 'directory':
    path.mkdir()
  elif kind in ('loop', 'dangling', 'null', 'zero'):
    path.symlink_to({'loop': path.name, 'dangling': 'nowhere'}.get(kind, f'/dev/{kind}'))
  elif kind == 'fifo':
    os.mkfifo(path)
  elif kind == 'socket':
    _socket(path)
  elif kind == 'moved':  # a link to the file itself, as in the hub's cache: nothing is wrong
    (path.parent / 'kept').mkdir(exist_ok=True)
    (path.parent / 'kept' / path.name).write_bytes(data)
    path.symlink_to(pathlib.Path('kept', path.name))
  elif kind == 'other' and others:
    shutil.copyfile(rng.choice(others), path)
  elif kind != 'absent':
    text = data.decode('latin-1')
    new = {'bom': b'\xef\xbb\xbf' + data, 'utf-16': text.encode('utf-16'), 'twice': data + data}
    path.write_bytes(new.get(kind, data.replace(b'\n', b'\r\n')))
  return f'{path.name}: {kind}'


def _socket(path: pathlib.Path) -> None:
  """A socket; bound by its name alone, since a whole path may be too long for one."""
  here = os.getcwd()
  os.chdir(path.parent)
  try:
    with socket.socket(socket.AF_UNIX) as found:
      found.bind(path.name)
  finally:
    os.chdir(here)


def damage_file(path: pathlib.Path, rng: random.Random) -> str:
  """Damages a file as JSON, if it is JSON, as bytes, or as a whole; returns what was done."""
  if rng.random() < 0.08:
    return replace_file(path, rng)
  data = path.read_bytes()
  if path.suffix == '.json' and rng.random() < 0.75:
    path.write_text(json_text(damage_json(json.loads(data), rng)))
    return f'{path.name}: values'
  if path.suffix == '.jinja' and rng.random() < 0.5:
    path.write_text(damage_template(data.decode(), rng))
    return f'{path.name}: hostile'
  path.write_bytes(damage_bytes(data, rng))
  return f'{path.name}: bytes'
