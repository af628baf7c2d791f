"""Command lines: options and values changed by chance, run up to the first heavy work of their mode."""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import sys
from typing import Any, NoReturn

import jax

from adapt_jax import cli
from adapt_jax.config.build import declarations, get
from adapt_jax.config.declare import Declaration
from adapt_jax.config.options import RunOptions
from adapt_jax.models.errors import InputError
from adapt_jax.modes import accel, bench, compare, estimate, evaluate, export, generate, sensitivity
from adapt_jax.pipeline import loader
from tests.fuzz.cases import Kind, Values
from tests.fuzz.run_state import FILES

_OPTIONS = dict(declarations())
_SLOW = ('evaluate.tasks', 'evaluate.suite', 'evaluate.tasks_path')  # import the harness, which takes seconds
_BASE = [
  '--config=recipe.py', '--workdir=out', '--mode=prune', '--config.data.cache=cache', '--prompt=the dog',
  '--config.compare.grid=({"prune.target": (0.9, 0.8)},)', '--config.bench.dense=model',
  '--config.export.formats=hf',
]  # fmt: skip
_WORDS = (
  '', ' ', '0', '-1', '1', '1.5', 'nan', 'inf', '-inf', '1e400', '1e-400', '9' * 400, '1_000', '0x10', '१२',
  'True', 'none', 'None', 'a,b', ',', '()', '(', "('a',)", "({'seed': (0, 1)},)", '{}', '[' * 5000,
  '(1,' * 50, 'x' * 5000, "({1: 2},)", "({'seed': ()},)", "({'nothing': 1},)", 'a\nb', '\x1b[31m', '\udcff',
  '🙂', '%s', '{0}', '~', '~nouser', '/dev/null', '/dev/zero', '.', '..', 'train.txt', 'model',
  'model/config.json', 'absent.txt', '*.txt', '**', '[', 'self', 'tensor_parallel=0', 'tensor_parallel=²',
  'tensor_parallel=2', 'gguf', 'x=train.txt', '=', 'a=train.txt,b=valid.txt', 'a=b=c', 'org/name',
  'org/name:a:b',
)  # fmt: skip
_MODES = (
  'accel', 'prune', 'evaluate', 'export', 'generate', 'bench', 'compare', 'sensitivity', 'estimate', 'plan',
  'x',
)  # fmt: skip
_RECIPES = (
  'base', 'bse', 'demo:x', 'recipe.py:x', 'raises.py', 'broken.py', 'none.py', 'model', 'absent.py', '',
  '.py', 'a\nb',
)  # fmt: skip
_WORKDIRS = (
  '', 'train.txt', '.', '/dev/null', 'out/a/b', '~x', 'out' * 99, 'out\udcff', 'out\n', 'model',
  'train.txt/x',
)  # fmt: skip
_FLAGS = (
  '--distributed=on', '--distributed=off', '--distributed=x', '--num_processes=2', '--process_id=-2',
  '--process_id=x', '--coordinator_address=x', '--coordinator_address=localhost:1', '--num_processes=0',
  '--help', '--version', '-h', 'word', '--', '--x', '-', '--config', '--workdir', '--prompt=',
  '--config.x=1', '--config.prune=1', '--config.prune.x=1', '--mode', '--config.prune.target',
  '--noconfig.train.remat', '--config.train.remat', '--flagfile=absent', '--flagfile=train.txt',
)  # fmt: skip


class _ReachedError(BaseException):
  """The checks are done, and heavy work begins."""


def _reach(*_: Any, **__: Any) -> NoReturn:
  raise _ReachedError


class Commands(Kind):
  """A command in a directory with a model and texts; its arguments are in argv.json."""

  name, share = 'command', 0.03
  # A flag may name the next one as workdir; Python keeps a compiled recipe beside it.
  writes = ('out*', 'cache*', '~*', '--*', '__pycache__*')

  def make(self, place: pathlib.Path) -> None:
    for name in ('model', 'train.txt', 'valid.txt', 'recipe.py'):
      copy = shutil.copytree if name == 'model' else shutil.copyfile
      copy(FILES / name, place / name)
    (place / 'raises.py').write_text("raise RuntimeError('two\\nlines')\n")
    (place / 'broken.py').write_text('def get_config(:\n')
    (place / 'none.py').write_text('def get_config():\n  return None\n')
    (place / 'argv.json').write_text(json.dumps(_BASE))

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    argv = list(_BASE)
    if rng.random() < 0.7:
      argv[2] = f'--mode={rng.choice(_MODES)}'
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
      act = rng.choices(['option', 'flag', 'recipe', 'workdir', 'remove', 'order'], [75, 8, 5, 4, 5, 3])[0]
      if act == 'option':
        name = rng.choice([name for name in _OPTIONS if name not in _SLOW])
        argv.append(f'--config.{name}={_value(name, _OPTIONS[name], rng)}')
      elif act == 'flag':
        argv.insert(rng.randrange(len(argv)), rng.choice(_FLAGS))
      elif act == 'recipe':
        argv[0] = f'--config={rng.choice(_RECIPES)}'
      elif act == 'workdir':
        argv[1] = f'--workdir={rng.choice(_WORKDIRS)}'
      elif act == 'remove':
        argv.pop(rng.randrange(len(argv)))
      else:
        rng.shuffle(argv)
    (place / 'argv.json').write_text(json.dumps(argv))
    return ' '.join(map(repr, argv[2:]))

  def observe(self, place: pathlib.Path) -> Values:
    os.chdir(place)
    argv, seen = json.loads((place / 'argv.json').read_text()), list[RunOptions]()
    _stop_at_work(seen)
    output, errors, end = io.StringIO(), io.StringIO(), 'ended'
    sys.argv = ['main.py', *argv]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
      try:
        cli.run()
      except _ReachedError:
        end = 'reached'
      except SystemExit as stop:
        end = repr(stop.code)
    said = errors.getvalue()
    if end == '2':
      if not said.startswith('error: ') or said.count('\n') != 1:
        raise AssertionError(f'exit code 2, and on stderr:\n{said}')
      raise InputError(said.removeprefix('error: ').removesuffix('\n'))
    if end not in ('reached', 'ended', '0', 'None') or 'Traceback' in said:
      raise AssertionError(f'it ended with {end}, and on stderr:\n{said}')
    options = {f'option {name}': repr(get(seen[-1], name)) for name in _OPTIONS} if seen else {}
    return {'end': end} | options

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """The options that the command names may have other values, and help ends at once."""
    argv = json.loads((place / 'argv.json').read_text())
    named = [a.lstrip('-').removeprefix('no').partition('=')[0] for a in argv + _BASE if 'config.' in a]
    found = {f'option {name.removeprefix("config.")}': '' for name in named}
    if any(a.startswith('--config=') and a != _BASE[0] for a in argv) or _BASE[0] not in argv:
      found['option *'] = ''  # another recipe
    if _BASE[2] not in argv:
      found['option train.tokens'] = ''  # mode prune sets it
    if {'--help', '-h', '--version'} & set(argv):
      found |= {'end': '', 'option *': ''}
    return found


def _value(name: str, declared: Declaration, rng: random.Random) -> str:
  """A value at the edge of what is allowed, a usual one, or any word."""
  if name == 'data.cache':  # a new name is a directory that is made, as asked
    return rng.choice(['cache/new', '/dev/null', 'train.txt', 'train.txt/x', '~nouser', 'cache' * 99])
  near = [str(get(RunOptions(), name)), *declared.choices]
  if declared.within:
    low, high = declared.within
    near += [str(x) for x in (low, high, low - 1, high + 1, low / 2, high * 2, (low + high) / 2)]
  return rng.choice(near if rng.random() < 0.4 else _WORDS)


def _stop_at_work(seen: list[RunOptions]) -> None:
  """Puts an end in the place of the first heavy work of each mode, and notes the options."""
  plain = cli._options

  def options() -> RunOptions:
    seen.append(plain())
    return seen[-1]

  cli._options = options
  accel.run_class = lambda options: _reach  # type: ignore[assignment]
  compare.Compare.execute = _reach  # type: ignore[method-assign]
  estimate.programs = _reach  # type: ignore[assignment]
  loader.self_text.draw = _reach
  export.Writer = _reach  # type: ignore[assignment,misc]
  sensitivity.Sensitivity = _reach  # type: ignore[assignment,misc]
  for mode in (bench, evaluate, export, generate):
    mode.load_source = _reach  # type: ignore[attr-defined]

  def refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError('no other process')

  jax.distributed.initialize = refuse


KINDS = (Commands(),)
