"""Prunes a LLaMA-family model and recovers it by interleaved training.

    python main.py --config=configs/demo.py --workdir=out [--mode=MODE]
                   [--config.FIELD=VALUE ...]

accel: prune and recover in stages. prune: the same without training. evaluate: perplexity of
model.source. convert: model.source to WORKDIR/hf, unchanged. sensitivity: perplexity when one
layer alone is pruned, for every layer. compare: a grid over config fields, a cell a run.
"""

import ast
import dataclasses
import shlex
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from adapt_jax import accel, compare, convert, evaluate, sensitivity
from adapt_jax.config import RunOptions, from_dict
from adapt_jax.workdir import Workdir
from models.errors import InputError


class _Strings(flags.ArgumentParser):
  """A list on the command line: a.txt,b.txt or, as Python has it, "('a,b.txt',)" or "({'seed': (0, 1)},)"."""

  def parse(self, argument: Any) -> tuple[str, ...]:
    if not isinstance(argument, str):
      return tuple(argument)
    if argument.startswith(('(', '[')):
      return tuple(ast.literal_eval(argument))
    return tuple(argument.split(','))

  def flag_type(self) -> str:
    return 'names separated by commas'


config_flags.register_flag_parser_for_type(tuple, _Strings())
_CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe: a file of configs/.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where all results of this run go.')
_RUN = {
  'accel': accel.run,
  'prune': accel.run,
  'evaluate': evaluate.run,
  'convert': convert.run,
  'sensitivity': sensitivity.run,
  'compare': compare.run,
}
_MODE = flags.DEFINE_enum('mode', 'accel', list(_RUN), 'What to do.')


def _options(mode: str) -> RunOptions:
  if _CONFIG.value is None:
    raise InputError('--config is missing: name a recipe such as configs/demo.py')
  name = config_flags.get_config_filename(flags.FLAGS['config'])
  try:
    values = _CONFIG.value.to_dict()
  except OSError:  # config_flags loads the recipe at its first use
    raise InputError(f'--config={name}: no such file; recipes lie in configs/') from None
  except Exception as error:  # a recipe is a program of the user's: it may fail in any way
    raise InputError(f'--config={name}: the recipe fails: {type(error).__name__}: {error}') from error
  options = from_dict(values)
  if mode in ('prune', 'sensitivity'):
    return dataclasses.replace(options, train=dataclasses.replace(options.train, tokens=0))
  if mode == 'accel' and options.train.tokens == 0:
    raise InputError('config.train.tokens = 0, but mode accel trains: set it, or use --mode=prune')
  return options


def _identity(mode: str, options: RunOptions) -> dict[str, Any]:
  """What makes two runs the same. A grid may grow, and its plots change: each cell has its own identity."""
  config = dataclasses.asdict(options)
  if mode == 'compare':
    config['compare'] = {'recover': options.compare.recover}
  return {'mode': mode, 'config': config}


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise InputError(f'{argv[1]!r} is not understood: flags are written --name=value')
  logging.set_verbosity(logging.WARNING)  # orbax tells a page a checkpoint
  mode = _MODE.value
  options = _options(mode)
  workdir = Workdir(_WORKDIR.value, _identity(mode, options))
  workdir.check()
  if workdir.report.exists() and mode != 'compare':  # its cells tell what is finished
    print(f'this run is finished: see {workdir.report}')
    return
  _RUN[mode](options, workdir, shlex.join(['python', *sys.argv]))


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    lines = [line for line in str(error).splitlines() if line.strip()]
    if any(line.startswith('Traceback') for line in lines):  # of a recipe that fails: its last line tells why
      lines = [lines[0], lines[-1]]
    raise InputError(' '.join(' '.join(lines).split())) from error
  except Exception as error:  # the recipe is loaded here: a program of the user's, it may fail in any way
    recipes = [a for a in argv if a.startswith('--config')]
    reason = ' '.join(str(error).split())
    raise InputError(f'{" ".join(recipes)}: {type(error).__name__}: {reason}') from error


def _run() -> None:
  try:
    app.run(main, flags_parser=_parse)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  _run()
