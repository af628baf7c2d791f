"""Prunes a LLaMA-family model and recovers it by interleaved training.

    python main.py --config=configs/demo.py --workdir=out [--mode=accel|prune|evaluate|convert]
                   [--config.FIELD=VALUE ...]

accel: prune and recover in stages. prune: the same without training. evaluate: perplexity of
model.source. convert: model.source to WORKDIR/hf, unchanged.
"""

import dataclasses
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from adapt_jax import accel, convert, evaluate
from adapt_jax.config import RunOptions, from_dict
from adapt_jax.workdir import Workdir
from models.errors import InputError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The recipe: a file of configs/.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Where all results of this run go.')
_MODE = flags.DEFINE_enum('mode', 'accel', ['accel', 'prune', 'evaluate', 'convert'], 'What to do.')
_RUN = {'accel': accel.run, 'prune': accel.run, 'evaluate': evaluate.run, 'convert': convert.run}


def _options(mode: str) -> RunOptions:
  if _CONFIG.value is None:
    raise InputError('--config is missing: name a recipe such as configs/demo.py')
  try:
    options = from_dict(_CONFIG.value.to_dict())
  except OSError:  # config_flags loads the recipe at its first use
    name = config_flags.get_config_filename(flags.FLAGS['config'])
    raise InputError(f'--config={name}: no such file; recipes lie in configs/') from None
  if mode == 'prune':
    return dataclasses.replace(options, train=dataclasses.replace(options.train, tokens=0))
  if mode == 'accel' and options.train.tokens == 0:
    raise InputError('config.train.tokens = 0, but mode accel trains: set it, or use --mode=prune')
  return options


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise InputError(f'{argv[1]!r} is not understood: flags are written --name=value')
  logging.set_verbosity(logging.WARNING)  # orbax tells a page a checkpoint
  mode = _MODE.value
  options = _options(mode)
  workdir = Workdir(_WORKDIR.value, {'mode': mode, 'config': dataclasses.asdict(options)})
  workdir.check()
  if workdir.report.exists():
    print(f'this run is finished: see {workdir.report}')
    return
  _RUN[mode](options, workdir)


def _parse(argv: list[str]) -> list[str]:
  # config_flags raises these for an unknown field, a wrong type and a broken recipe.
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    raise InputError(' '.join(str(error).split())) from error


def _run() -> None:
  try:
    app.run(main, flags_parser=_parse)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  _run()
