"""Texts of `--help` and `--version`, the short form of commands, the recipes, and the page of options.

python -m adapt_jax.cli_help > docs/options.md
"""

import ast
import importlib.metadata
import pathlib
import textwrap

from adapt_jax.config.build import declarations, get, like
from adapt_jax.config.declare import Declaration
from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import plain
from adapt_jax.models.errors import InputError
from adapt_jax.modes.registry import MODES
from adapt_jax.reports.compare_tables import short
from adapt_jax.reports.table import Table

# Recipes are next to this file: a folder in the wheel, a link to configs/ in a checkout.
RECIPES = pathlib.Path(__file__).parent / 'configs'
_USAGE = """\
Prunes a LLaMA-family model, in one stage or several, and recovers its quality by training.

    adapt-jax [--config=RECIPE] --workdir=DIRECTORY [--mode=MODE] [--config.OPTION=VALUE ...]
    adapt-jax MODE [MODEL [TEXT]] [--workdir=DIRECTORY] [--OPTION=VALUE ...]

The second form is short for the first: --target=0.75 is --config.prune.target=0.75. Its workdir is
out/MODE unless named.
`python main.py` does the same in a checkout.

Modes:
{modes}

Recipes (a name or your own file; RECIPE:VARIANT if a recipe has variants):
{recipes}

Options: --mode=MODE --help lists the options of a mode, with defaults and meanings.
Several processes: --distributed, --coordinator_address, --num_processes, --process_id (docs/cluster.md).
Unexpected errors: --debug shows the traceback, which is otherwise written into a file.
Guides: README.md and docs/ in the repository.
"""
_TEACHER = 'train.distill.source'  # named where nothing is pruned
_TEXTS = ('prune.calibration.source', 'train.source', 'evaluate.source')  # a mode's TEXT is the first it uses
_ALONE = ('-h', '--help', '--helpfull', '--version', '--debug', '--nodebug')
# The options that most users set, with values for examples.
_FIRST = {
  'model.source': 'HuggingFaceTB/SmolLM2-135M-Instruct',
  _TEACHER: 'HuggingFaceTB/SmolLM2-360M-Instruct',
  'prune.target': '0.75',
  'prune.calibration.source': 'calibration.txt',
  'train.source': 'corpus.jsonl',
  'train.tokens': '2_000_000',
  'evaluate.source': 'heldout.txt',
  'narrow.hidden': '512',
  'compare.grid': '"({' + "'prune.target': (0.9, 0.8)" + '},)"',
  'export.formats': 'hf,gguf',
}
_PAGE = """
On the command line write `--config.prune.target=0.75`, in a recipe `config.prune.target = 0.75`. Separate
several values with commas. This page is generated from the declarations (`python -m adapt_jax.cli_help`)."""


def asked_for(arguments: list[str]) -> str:
  """The text that these arguments request; '' if they request a run. Raises InputError for unknown modes."""
  if '--version' in arguments:
    return f'adapt-jax {importlib.metadata.version("adapt-jax")}'
  given = [a.partition('=')[2] for a in arguments if a.lstrip('-').startswith('mode=')]
  if unknown := [mode for mode in given if mode not in MODES]:
    hint = like(unknown[0], [*MODES]) or f': choose {", ".join(MODES)}'
    raise InputError(f'--mode={unknown[0]} is unknown{hint}')
  if not {'--help', '-h', '-help', '--helpfull'} & set(arguments):
    return ''
  return _options(given[-1]) if given else _usage()


def _usage() -> str:
  recipes = {}
  for path in sorted(RECIPES.glob('*.py')):
    text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    recipes[path.stem] = text.partition('\n\n')[0].replace('\n', ' ')
  modes = {mode.name: mode.help for mode in MODES.values()}
  return _USAGE.format(modes=_table(modes), recipes=_table(recipes)).rstrip()


def _table(rows: dict[str, str]) -> str:
  width = max(map(len, rows)) + 2
  return '\n'.join(
    textwrap.fill(text, 100, initial_indent=f'  {name:{width}}', subsequent_indent=' ' * (width + 2))
    for name, text in rows.items()
  )


def _options(mode: str) -> str:
  """An example of a mode, and its options, the most used first: name, default, range or choices, meaning."""
  known, options, used = dict(declarations()), RunOptions(), _used(mode)
  first = [field for field in _FIRST if field in used and not (field == _TEACHER and 'prune.target' in used)]
  where = ['--workdir=out/run'] if MODES[mode].result else []
  asked = ["--prompt='What is 7 plus 5?'"] if mode == 'generate' else []
  ends = short(used)
  named = [f'--{ends[name]}={_FIRST[name]}' for name in first if name not in _places(used)]
  placed = [_FIRST[name] for name in _places(used)]
  example = [' '.join(['adapt-jax', mode, *placed]), *where, *named, *asked]
  lines = [f'--mode={mode}: {MODES[mode].help}. For example:', '', '    ' + ' \\\n        '.join(example)]
  lines += ['', 'Its options, the most used first:', '']
  for field in dict.fromkeys([*first, *used]):
    declared = known[field]
    limits = ''.join(f', {text}' for text in _limits(declared))
    lines.append(f'--config.{field}={_default(options, field)}{limits}')
    lines.append(textwrap.indent(textwrap.fill(declared.meaning, 96), '    '))
  return '\n'.join(lines)


def _default(options: RunOptions, field: str) -> str:
  value = get(options, field)
  return str(value) if value == () else plain(value) or "''"


def _limits(declared: Declaration) -> list[str]:
  limits = []
  if declared.within:
    limits.append('from {:g} to {:g}'.format(*declared.within))
  if declared.choices:
    limits.append(f'one of {", ".join(choice or repr(choice) for choice in declared.choices)}')
  return limits


def options_page() -> str:
  """Every option as Markdown, a table for each group."""
  options, groups = RunOptions(), dict[str, list[list[str]]]()
  for field, declared in declarations():
    limits = '; '.join(_limits(declared))
    row = [f'`{field}`', f'`{_default(options, field)}`', limits, declared.meaning]
    groups.setdefault(field.rpartition('.')[0] or 'The run', []).append(row)
  head = ['option', 'default', 'values', 'meaning']
  parts = [f'\n## {group}\n\n{Table(head, rows).markdown()}' for group, rows in groups.items()]
  return '\n'.join(['# Options', _PAGE, *parts]) + '\n'


def _used(mode: str) -> list[str]:
  return [field for field, _ in declarations() if MODES[mode].uses(field)]


def _places(used: list[str]) -> list[str]:
  """The options that the short form's MODEL and TEXT are."""
  texts = [name for name in _TEXTS if name in used]
  return ['model.source', *texts[:1]]


def _meant(name: str, used: list[str]) -> list[str]:
  return [name] if name in used else [field for field in used if field.endswith(f'.{name}')]


def written_out(argv: list[str]) -> list[str]:
  """The flags that the short form `MODE [MODEL [TEXT]] --OPTION=VALUE` stands for; other arguments unchanged.

  OPTION is an option's name or its end, if no other option of the mode ends so. Raises InputError.
  """
  program, *rest = argv
  if not rest or rest[0].startswith('-'):
    return argv
  mode, *rest = rest
  if mode not in MODES:
    raise InputError(f'{mode!r} is no mode{like(mode, [*MODES])}; adapt-jax --help lists them')
  used = _used(mode)
  places = _places(used)
  flags = {'--mode': f'--mode={mode}', '--config': ''}  # a recipe goes before its options
  for argument in rest:
    name, equals, value = argument.removeprefix('--').partition('=')
    meant = _meant(name.removeprefix('config.'), used)
    if not argument.startswith('-') and places:
      meant, value = [places.pop(0)], argument
    elif argument not in _ALONE and not (argument.startswith('--') and equals):
      raise InputError(f'{argument!r} is not understood: options are written --NAME=VALUE')
    if meant[1:]:
      raise InputError(f'--{name} is short for --{", --".join(meant)}: write one of them')
    flag = f'--config.{meant[0]}' if meant else f'--{name}'
    if flags.get(flag):
      raise InputError(f'{argument!r}: {flag} is given twice')
    flags[argument if flag == '--prompt' else flag] = f'{flag}={value}' if meant else argument
  if MODES[mode].result:
    flags.setdefault('--workdir', f'--workdir=out/{mode}')
  return [program, *filter(None, flags.values())]


def with_recipes(argv: list[str]) -> list[str]:
  """The arguments with the name of a recipe replaced by its file: --config=demo, --config=studies:rates.

  Without a recipe it is base.
  """
  arguments = list(argv)
  if not {'--config', '-config'} & {argument.partition('=')[0] for argument in argv}:
    return [*argv[:1], f'--config={_recipe("base")}', *argv[1:]]
  for i, argument in enumerate(argv):
    flag, equals, value = argument.partition('=')
    if flag not in ('--config', '-config'):
      continue
    if equals:
      arguments[i] = f'{flag}={_recipe(value)}'
    elif argv[i + 1 :]:
      arguments[i + 1] = _recipe(argv[i + 1])
  return arguments


def _recipe(value: str) -> str:
  given, colon, variant = value.partition(':')
  if pathlib.Path(given).is_file():
    return value
  # Also accepts configs/demo.py and demo.py, as written in the docs, if there is no such file.
  name = given.removeprefix('configs/').removesuffix('.py')
  known = [path.stem for path in RECIPES.glob('*.py')]
  if name not in known:
    raise InputError(
      f'--config={value}: no such file or recipe{like(name, known)}; adapt-jax --help lists the recipes'
    )
  return f'{RECIPES / name}.py{colon}{variant}'


if __name__ == '__main__':
  print(options_page(), end='')
