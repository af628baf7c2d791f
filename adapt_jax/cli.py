"""The command line: flags, devices, and which mode runs.

`adapt-jax`, if the package is installed, and `python main.py` in a checkout are the same.
"""

import ast
import contextlib
import difflib
import io
import itertools
import os
import pathlib
import re
import shlex
import sys
import traceback
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from adapt_jax import cli_help
from adapt_jax.config.build import defaults, flatten, from_dict
from adapt_jax.config.options import RunOptions
from adapt_jax.export.push import push
from adapt_jax.machine import mesh, preemption, processes
from adapt_jax.machine.compiler import keep_programs
from adapt_jax.models.errors import InputError, Unreachable, disk_full, write_denied
from adapt_jax.models.files import exists, local, regular
from adapt_jax.modes.mode import Mode
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.serving_widths import aligned


class _Strings(flags.ArgumentParser):
  """A list on the command line: a.txt,b.txt or, in Python syntax, "('a,b.txt',)" or "({'seed': (0, 1)},)"."""

  def parse(self, argument: Any) -> tuple[str, ...]:
    if not isinstance(argument, str):
      return tuple(argument)
    if argument.startswith(('(', '[')):
      try:
        found = ast.literal_eval(argument)
      except (SyntaxError, ValueError):
        found = None
      if not isinstance(found, (list, tuple)):  # ('a.txt') is a string
        raise ValueError('no list')
      return tuple(found)
    return tuple(argument.split(','))

  def flag_type(self) -> str:
    return 'names separated by commas'


config_flags.register_flag_parser_for_type(tuple, _Strings())
_ARGV: list[
  str
] = []  # filled by `_parse`: config_flags would read sys.argv, with all its --flagfile, at import
_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The recipe: its name, such as demo, or its file.', sys_argv=_ARGV
)
_WORKDIR = flags.DEFINE_string('workdir', '', 'Directory for all results of this run.')
_MODE = flags.DEFINE_enum('mode', 'accel', [*MODES], 'The mode to run.')
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Prompt for --mode=generate; may be repeated.')
_NO_CONFIG = '--config is missing: name a recipe such as base; adapt-jax --help lists them'
_KINDS = {  # a sign in Python's message -> what the option takes
  'invalid literal for int': 'a whole number, such as 10_000_000',
  'convert string to float': 'a number, such as 0.8 or 1e-4',
  'boolean flag': 'True or False',
  'no list': "names separated by commas, or a list in Python syntax, such as ('a.txt', 'b.txt')",
}
_TYPES = {'int': 'a whole number', 'float': 'a number', 'bool': 'True or False', 'tuple': 'a tuple'}
_OTHER_TYPE = re.compile(
  r"Could not override field '(\w+)'.*?\. (.*) is of original type .* casted to type <class '(\w+)'>"
)
_LATER = 75  # exit code of what may succeed later; schedulers start it again
_DISTRIBUTED = flags.DEFINE_enum(
  'distributed', 'auto', processes.MODES, 'Whether the scheduler starts several processes.'
)
_ADDRESS = flags.DEFINE_string('coordinator_address', '', 'host:port of process 0, without a scheduler.')
_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'Number of processes, without a scheduler.')
_PROCESS = flags.DEFINE_integer('process_id', -1, 'Index of this process, from 0.')


def _options() -> RunOptions:
  if _CONFIG.value is None:
    raise InputError(_NO_CONFIG)
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    values = _CONFIG.value.to_dict()
  except OSError:  # config_flags loads the recipe at its first use
    raise InputError(_no_recipe(name)) from None
  except Exception as error:  # a recipe is user code and may fail in any way
    raise InputError(f'--config={name}: the recipe fails: {type(error).__name__}: {error}') from error
  return from_dict(values)


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise InputError(f'{argv[1]!r} is not understood: flags are written --name=value')
  for argument in sys.argv:
    if argument.encode(errors='replace').decode() != argument:
      raise InputError(f'{argument!r} is not UTF-8, which reports cannot quote: rename the file')
  logging.set_verbosity(logging.WARNING)  # orbax logs a page per checkpoint
  mode = MODES[_MODE.value]
  options = mode.settle(_options())
  described = mode.devices(options) if mode.devices else None
  processes.start(_DISTRIBUTED.value, _ADDRESS.value, _PROCESSES.value, _PROCESS.value)
  if not mode.devices:  # a plan needs details that the cache of compiled programs lacks
    keep_programs()
  if jax.process_count() > 1 and not mode.several_processes:
    raise InputError(f'--mode={mode.name} runs in one process, not in {jax.process_count()}: start it alone')
  with contextlib.ExitStack() as stack:
    if mode.mesh and (devices := mesh.make_mesh(options.mesh, described)):
      stack.enter_context(jax.set_mesh(devices))
    if not mode.grows:  # a grid does this for each cell
      options = aligned(options)
    workdir = Workdir(_WORKDIR.value, mode.identity(options)) if mode.result else None
    if workdir and _finished(workdir, mode, options):
      return
    if not workdir:
      mode.run(options, _PROMPT.value)
      return
    stack.enter_context(preemption.watched())
    mode.run(options, workdir, _command())


def _finished(workdir: Workdir, mode: Mode, options: RunOptions) -> bool:
  """Checks that the workdir is new or belongs to this run; says so of a finished run, and uploads it."""
  processes.decide(workdir.check)
  if mode.grows or not processes.decide(workdir.report.exists):  # its cells record what is finished
    return False
  more = f'; --mode=export --config.model.source={workdir.path} writes its model in other formats'
  processes.say(f'this run is finished: see {workdir.report}{more * (mode.name in ("accel", "prune"))}')
  if mode.uses('export.push'):  # an upload may have failed, or be asked only now
    processes.decide(lambda: push(options.export, workdir.path))
  return True


def _command() -> str:
  """The command as typed, quoted for a shell."""
  program, *arguments = sys.argv
  started = ['python', program] if program.endswith('.py') else [pathlib.Path(program).name]
  return shlex.join([*started, *arguments])


def _no_recipe(name: str) -> str:
  hint = cli_help.close_recipe(name) or '; your own files must end with .py'
  return f'--config={name}: no such file or recipe (adapt-jax --help lists recipes){hint}'


def _wrong_kind(message: str) -> str:
  """Python's message about a value of the wrong kind, such as int('10M'), for someone who sets an option."""
  for sign, wanted in _KINDS.items():
    if found := re.fullmatch(rf'flag --(config\.[\w.]+)=(.*): .*{sign}.*', message):
      return f'{found[1]} = {found[2]!r} must be {wanted}'
  if found := re.fullmatch(
    r"flag --(config\.[\w.]+)=.*: Failed to parse '(.*)' as a ConfigDict: .*", message
  ):
    group, value = found.groups()
    fields = ', '.join(field for field in flatten(defaults()) if f'config.{field}'.startswith(f'{group}.'))
    return f'{group} = {value!r}, but {group} is a group of options: set one of {fields}'
  if found := _OTHER_TYPE.search(message):  # set in a recipe
    field, value, wanted = found.groups()
    return f'{field} = {value!r} in the recipe must be {_TYPES.get(wanted, wanted)}'
  return re.sub(r'flag (--config=\S+) Error whilst parsing config file: \w+: ', r'\1 ', message)


def _like(name: str) -> str:
  """The option that a misspelt one is like, and where all of them are listed."""
  known = [f'config.{field}' for field in flatten(defaults())]
  found = [field for field in known if field.rpartition('.')[2] == name]
  found += difflib.get_close_matches(name, [*known, 'config', 'workdir', 'mode', 'prompt', 'distributed'], 1)
  return f': did you mean --{found[0]}?' if found else '; --mode=MODE --help lists all options'


def _recipe(argv: list[str]) -> str:
  """The recipe's file as given; the flag itself has no value yet if loading the file failed."""
  given = [a.partition('=')[2] for a in argv if re.match('--?config=', a)]
  given += [value for flag, value in itertools.pairwise(argv) if flag in ('--config', '-config')]
  return given[-1] if given else ''


def _check_flagfiles(argv: list[str]) -> None:
  """Raises InputError for a --flagfile that absl could not read to its end."""
  for argument, value in itertools.pairwise([*argv, '']):
    flag, given, path = argument.partition('=')
    path = path if given else value
    if flag in ('--flagfile', '-flagfile') and path:
      try:
        regular(local(path))
      except OSError as error:
        raise InputError(f'--flagfile={path} cannot be read ({error.strerror})') from None


def _parse(argv: list[str]) -> list[str]:
  if shown := cli_help.asked_for(argv[1:]):
    print(shown, flush=True)
    sys.exit(0)
  _check_flagfiles(argv)
  _ARGV[:] = argv = cli_help.with_recipes(argv)
  logging.set_verbosity(logging.ERROR)  # what ml_collections warns of is also an error, in one line
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    given = any(argument.lstrip('-').startswith('config=') for argument in argv)
    misspelt = '.' not in error.flagname and difflib.get_close_matches(error.flagname, ['config'])
    if not given and not misspelt:
      raise InputError(_NO_CONFIG) from None
    raise InputError(f'--{error.flagname} is unknown{_like(error.flagname)}') from None
  except flags.Error as error:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if any(line.startswith('Traceback') for line in lines):  # of a failed recipe: its last line is the reason
      lines = [lines[0], lines[-1]]
    raise InputError(_wrong_kind(' '.join(' '.join(lines).split()))) from error
  except AttributeError as error:  # ml_collections found no such field, or no function in the recipe
    if 'get_config' in str(error):
      raise InputError(f'--config={_recipe(argv)}: the file has no function get_config()') from None
    names = [argument.lstrip('-').partition('=')[0] for argument in argv]
    known = flatten(defaults())
    for name in (name for name in names if name.startswith('config.') and name[7:] not in known):
      raise InputError(f'--{name} is unknown{_like(name)}') from None
    found = re.sub(r'\\n|[\\"\']', ' ', str(error.args[0])).split()  # of the recipe; it quotes itself twice
    raise InputError(f'--config={_recipe(argv)}: no option {" ".join(found)}') from None
  except Exception as error:  # the recipe is loaded here; user code may fail in any way
    name = _recipe(argv)
    if isinstance(error, OSError) and not pathlib.Path(name.partition(':')[0]).exists():
      raise InputError(_no_recipe(name)) from None
    reason = ' '.join(str(error).split())
    raise InputError(f'--config={name}: {type(error).__name__}: {reason}') from error


def run() -> None:
  """Runs the command line; the exit code is 2 if the user must correct something."""
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # closed by the caller, as with `>&-`
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 as long as the process
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='replace')  # as on stderr, what a terminal's encoding lacks
  try:
    app.run(main, flags_parser=_parse)
  except Unreachable as error:  # a run that was started has reached it before, and may again
    started = bool(MODES[_MODE.value].result) and exists(local(_WORKDIR.value) / 'run.json')
    _fail(str(error), _LATER if started else 2)
  except InputError as error:
    _fail(str(error))
  except preemption.Preempted as stop:
    stopped = f'stopped by {preemption.cause()}'
    processes.say(' '.join((stopped, *stop.args)) + ': run the same command to continue')
    if preemption.cause() != 'SIGTERM':
      processes.leave(130)
  except KeyboardInterrupt:
    print('stopped by Ctrl-C', file=sys.stderr)
    processes.leave(130)
  except (BrokenPipeError, processes.OutputClosed):  # as in `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if _WORKDIR.present:
      print('error: the output pipe was closed: run the same command again', file=sys.stderr)
    processes.leave(1)
  except Exception as error:
    if reason := disk_full(error):
      _fail(f'--workdir={_WORKDIR.value}: {reason}: free space and run the same command again to resume')
    if reason := write_denied(error, _WORKDIR.value):
      _fail(
        f'--workdir={_WORKDIR.value}: {reason}: make it writable and run the same command again to resume'
      )
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    processes.explain(error)
    processes.leave(1)


def _fail(message: str, code: int = 2) -> NoReturn:
  print(f'error: {message}', file=sys.stderr)
  processes.leave(code)
