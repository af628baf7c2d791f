"""The command line: flags, devices, and which mode runs.

`adapt-jax`, if the package is installed, and `python main.py` in a checkout are the same.
"""

import ast
import contextlib
import io
import os
import pathlib
import shlex
import sys
import tempfile
import traceback
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from adapt_jax import cli_help
from adapt_jax.config.build import declarations, from_dict, like
from adapt_jax.config.identity import RUNS
from adapt_jax.config.options import RunOptions
from adapt_jax.export.push import push
from adapt_jax.machine import memory, mesh, preemption, processes
from adapt_jax.machine.compiler import keep_programs
from adapt_jax.models.errors import InputError, Unreachable, disk_full, first_line, reading, write_denied
from adapt_jax.models.files import exists, local
from adapt_jax.modes.mode import Mode
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.dense_model import with_training_dtype
from adapt_jax.pipeline.stages import trained
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.serving_widths import aligned


class _Strings(flags.ArgumentParser):
  """A list on the command line: a.txt,b.txt or, in Python syntax, "('a,b.txt',)" or "({'seed': (0, 1)},)"."""

  def parse(self, argument: Any) -> tuple[Any, ...]:
    if not isinstance(argument, str):
      return tuple(argument)
    value: Any = argument.split(',')
    if argument.startswith(('(', '[')):
      with contextlib.suppress(SyntaxError, ValueError):  # a name that begins so
        value = ast.literal_eval(argument)
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


config_flags.register_flag_parser_for_type(tuple, _Strings())
_CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe: its name or file; base by default.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Directory for all results of this run.')
_MODE = flags.DEFINE_enum('mode', 'accel', [*MODES], 'The mode to run.')
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'Prompt for --mode=generate; may be repeated.')
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the traceback of an unexpected error.')
_DISTRIBUTED = flags.DEFINE_enum(
  'distributed', 'auto', processes.MODES, 'Whether the scheduler starts several processes.'
)
_ADDRESS = flags.DEFINE_string('coordinator_address', '', 'host:port of process 0, without a scheduler.')
_PROCESSES = flags.DEFINE_integer('num_processes', 0, 'Number of processes, without a scheduler.')
_PROCESS = flags.DEFINE_integer('process_id', -1, 'Index of this process, from 0.')
_LATER = 75  # exit code of what may succeed later; schedulers start it again


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags and loads the recipe, or prints the help; one InputError for all that may go wrong."""
  if shown := cli_help.asked_for(argv[1:]):
    print(shown, flush=True)
    sys.exit(0)
  logging.set_verbosity(logging.ERROR)  # what ml_collections warns of is also an error, in one line
  argv = cli_help.with_recipes(argv)
  try:
    rest: list[str] = flags.FLAGS(argv)
  except Exception as error:  # of absl, of ml_collections, or of a recipe, which is user code
    raise InputError(_unknown(argv, error) or _one_line(error)) from None
  return rest


def _unknown(argv: list[str], error: Exception) -> str:
  """The flag that is unknown, with the one that was probably meant; '' if there is none."""
  options = [f'config.{field}' for field, _ in declarations()]
  names = [argument.lstrip('-').partition('=')[0] for argument in argv]
  unknown = [name for name in names if name.startswith('config.') and name not in options]
  if not unknown and isinstance(error, flags.UnrecognizedFlagError):
    unknown = [error.flagname]
  if not unknown:
    return ''
  ends = [option.rpartition('.')[2] for option in options]  # as the short form has them
  return (
    f'--{unknown[0]} is unknown{like(unknown[0], [*options, *ends, "config", "workdir", "mode", "prompt"])}'
  )


def _one_line(error: Exception) -> str:
  """What absl, ml_collections or a recipe says: without the traceback that it may contain."""
  message = str(error.args[0] if isinstance(error, KeyError) else error)
  lines = [line.strip() for line in message.splitlines() if line.strip()]
  if 'Traceback (most recent call last):' in lines:
    lines = [lines[0], lines[-1]]
  where = '' if isinstance(error, flags.Error) else f'flags or recipe: {type(error).__name__}: '
  return where + ' '.join(lines)


def main(argv: list[str]) -> None:
  if argv[1:]:
    hint = 'a mode is the first word' if argv[1] in MODES else 'flags are written --name=value'
    raise InputError(f'{argv[1]!r} is not understood: {hint}')
  for argument in sys.argv:
    if argument.encode(errors='replace').decode() != argument:
      raise InputError(f'{argument!r} is not UTF-8, which reports cannot quote: rename the file')
  logging.set_verbosity(logging.WARNING)  # orbax logs a page per checkpoint
  mode = MODES[_MODE.value]
  with reading('--config', config_flags.get_config_filename(flags.FLAGS['config']), 'correct the recipe'):
    values = _CONFIG.value.to_dict()
  options = mode.settle(from_dict(values))
  described = mode.devices(options) if mode.devices else None
  trains = 'train' in mode.identity(options)['config'] and (mode.grows or trained(options))
  if trains:
    memory.keep()
  processes.start(_DISTRIBUTED.value, _ADDRESS.value, _PROCESSES.value, _PROCESS.value)
  if (count := processes.count()) > 1 and not mode.several_processes:
    raise InputError(f'--mode={mode.name} runs in one process, not in {count}: start it alone')
  if not mode.devices:  # a plan needs details that the cache of compiled programs lacks
    mesh.check_platform(options.mesh)
    keep_programs()
  if mode.result:
    processes.say(f'devices: {mesh.devices_text()}')
  if trains:
    options = with_training_dtype(options, _WORKDIR.value)
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
  model = workdir.path / 'sizes/NAME' if isinstance(options.prune.target, tuple) else workdir.path
  more = f'; --mode=export --config.model.source={model} writes its model in other formats'
  processes.say(f'this run is finished: see {workdir.report}{more * (mode.name in RUNS)}')
  if mode.uses('export.push'):  # an upload may have failed, or be asked only now
    processes.decide(lambda: push(options.export, workdir.path))
  return True


def _command() -> str:
  """The command as typed, quoted for a shell."""
  program, *arguments = sys.argv
  started = ['python', program] if program.endswith('.py') else [pathlib.Path(program).name]
  return shlex.join([*started, *arguments])


def run() -> None:
  """Runs the command line.

  The exit code is 2 for what the user must correct, 75 for what may succeed later, 130 after Ctrl-C, and 1
  after an unexpected error.
  """
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # closed by the caller, as with `>&-`
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 as long as the process
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='replace')  # as on stderr, what a terminal's encoding lacks
  try:
    sys.argv = cli_help.written_out(sys.argv)  # where ml_collections looks for options
    app.run(main, flags_parser=_parse)
  except Unreachable as error:  # a run that was started has reached it before, and may again
    started = MODES[_MODE.value].result and exists(local(_WORKDIR.value) / 'run.json')
    _fail(str(error), _LATER if started else 2)
  except InputError as error:
    _fail(str(error))
  except preemption.Preempted as stop:
    stopped = f'stopped by {preemption.cause()}'
    processes.say(' '.join((stopped, *stop.args)) + ': run the same command to continue')
    code = 0 if preemption.cause() == 'SIGTERM' else 130
    if preemption.abandoned():
      os._exit(code)  # all output has been flushed
    if code:
      processes.leave(code)
  except KeyboardInterrupt:
    print('stopped by Ctrl-C', file=sys.stderr)
    processes.leave(130)
  except (BrokenPipeError, processes.OutputClosed):  # as in `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if _WORKDIR.present:
      print('error: the output pipe was closed: run the same command again', file=sys.stderr)
    processes.leave(1)
  except Exception as error:
    _unexpected(error)


def _unexpected(error: Exception) -> NoReturn:
  """Says in one line what went wrong, and in which file the traceback is."""
  processes.explain(error)
  if reason := disk_full(error) or write_denied(error, _WORKDIR.value):
    _fail(f'--workdir={_WORKDIR.value}: {reason}: correct it and run the same command again to resume')
  lines = ''.join(traceback.format_exception(error))
  if _DEBUG.value:
    print(lines, file=sys.stderr, end='')
    processes.leave(1)
  workdir = local(_WORKDIR.value)
  place = workdir if _WORKDIR.value and exists(workdir / 'run.json') else None
  with tempfile.NamedTemporaryFile(
    'w', encoding='utf-8', errors='replace', dir=place, prefix='traceback-', suffix='.txt', delete=False
  ) as file:
    file.write(lines)
  kind = type(error).__name__
  _fail(f'{kind}: {first_line(error)}: {file.name} has the traceback, and --debug shows it', 1)


def _fail(message: str, code: int = 2) -> NoReturn:
  print(f'error: {message}', file=sys.stderr)
  processes.leave(code)
