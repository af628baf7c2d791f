"""The last lines that a run prints: what to do with its result, as commands to paste into its shell."""

import importlib.util
import json
import pathlib
import shlex
import shutil
import sys
from collections.abc import Iterator

from adapt_jax.export.card_metadata import is_quantised
from adapt_jax.export.formats import FORMATS
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_config
from adapt_jax.pruning import file_size
from adapt_jax.reports.report import RunReport

_PROMPT = 'What is the capital of France?'
_TYPE = 'Q8_0'  # which needs no other program; K-quants are smaller


def last_lines(report: RunReport, workdir: pathlib.Path, command: str) -> list[str]:
  """A line that says what they are, and the commands: none for a run that has written nothing."""
  if not (exports := report.get('exports')):
    return []
  directory, program = _relative(workdir), _program(command)
  source = directory if 'hf' in exports else f'{directory}/{next(iter(exports))}'
  commands = [shlex.join([_python(), '-m', 'webbrowser', '-t', (workdir.resolve() / 'report.html').as_uri()])]
  commands.append(_generate(program, source))
  what = ['the page', 'an answer']
  for name in ('hf', 'hf_padded'):
    if name in exports:
      commands.append(_transformers(f'{directory}/{name}', code=any((workdir / name).glob('modeling_*.py'))))
      needs = '' if importlib.util.find_spec('torch') else ' (install torch first)'
      what.append(f'the model in transformers{needs}')
      break
  for said, line in _smaller(exports, workdir, directory, program):
    what.append(said)
    commands.append(line)
  return ['', f'Paste one of these lines: {"; ".join(what)}', *commands]


def _generate(program: list[str], source: str) -> str:
  return shlex.join([*program, 'generate', source, f'--prompt={_PROMPT}'])


def _transformers(path: str, code: bool) -> str:
  trust = ', trust_remote_code=True' if code else ''
  loads = f'print(M.from_pretrained({json.dumps(path)}{trust}))'
  return shlex.join([_python(), '-c', f'from transformers import AutoModelForCausalLM as M; {loads}'])


def _smaller(
  exports: dict[str, dict[str, object]], workdir: pathlib.Path, directory: str, program: list[str]
) -> Iterator[tuple[str, str]]:
  """The smallest quantised file if there is one, else how to write one if llama.cpp has such models."""
  if quantised := [name for name in exports if is_quantised(name)]:
    name = min(quantised, key=lambda name: int(str(exports[name]['bytes'])))
    size = int(str(exports[name]['bytes'])) / 1e6
    yield f'the answer of {name} ({size:,.0f} MB)', _generate(program, f'{directory}/{name}')
    return
  if 'hf' not in exports:
    return
  config = open_config(str(workdir))
  for form in ('gguf', 'gguf_padded'):
    if fits(form, config):
      size = file_size.gguf(FORMATS[form].shape(config), _TYPE).dense / 1e6
      flags = [f'--workdir={directory}-{_TYPE}', f'--formats={form}', f'--gguf_types={_TYPE}']
      what = f'a {_TYPE} file of about {size:,.0f} MB for llama.cpp'
      yield what, shlex.join([*program, 'export', directory, *flags])
      return


def fits(form: str, config: ModelConfig) -> bool:
  """Whether a format can hold a model."""
  try:
    FORMATS[form].check(FORMATS[form].shape(config), (_TYPE,))
  except InputError:
    return False
  return True


def _relative(path: pathlib.Path) -> str:
  """The path from here if it is below, else the whole."""
  path, here = path.resolve(), pathlib.Path.cwd().resolve()
  return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


def _python() -> str:
  """The name of this Python for a shell."""
  here, path = pathlib.Path.cwd(), pathlib.Path(sys.executable)
  if shutil.which('python') == sys.executable:
    return 'python'
  return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _program(command: str) -> list[str]:
  """The program as it was started: adapt-jax, or a Python and its main.py."""
  first, *rest = shlex.split(command)
  if first == 'python':
    return [_python(), rest[0]]
  return [first if shutil.which(first) else sys.argv[0]]
