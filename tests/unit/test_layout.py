"""The house rules of ARCHITECTURE that a program can check: imports go down only, files stay small."""

import ast
import graphlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA_FOR_OTHERS = 'adapt_jax/export/hf_code/'  # copied into exports, run by transformers
MAX_LINES = 400

# Folders of adapt_jax and models from the top; a module may import its own folder and those below.
FOLDERS = {
  'adapt_jax': (
    'modes', 'pipeline', 'pruning', 'evaluation', 'export', 'training', 'generation', 'data', 'reports',
    'machine', 'config',
  ),
  'models': ('formats', 'network'),
}  # fmt: skip
PICKLES = {'pickle', 'cloudpickle', 'dill', 'shelve', 'joblib'}  # loading one runs code
NO_JAX = (
  'adapt_jax/pruning/widths.py',
  'adapt_jax/modes/compare_grid.py',
  'adapt_jax/pruning/plan.py',
  'adapt_jax/pruning/methods/__init__.py',
)
CLI = ('adapt_jax/cli.py', 'adapt_jax/cli_help.py')
# Nothing imports them but main.py, each other and, at its first use, the package.
TOP = (*CLI, 'adapt_jax/api.py', 'adapt_jax/api_arguments.py', 'adapt_jax/api_model.py')
TOKENIZER_FILES = tuple(
  f'models/formats/{name}.py' for name in ('source', 'gguf_tokenizer', 'trimmed_tokenizer')
)

SOURCES = {
  path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding='utf-8'), str(path))
  for top in ('main.py', 'configs', 'adapt_jax', 'models', 'scripts', 'tests')
  for path in ([ROOT / top] if top.endswith('.py') else sorted((ROOT / top).rglob('*.py')))
}
OURS = [name for name in SOURCES if not name.startswith((DATA_FOR_OTHERS, 'tests/'))]


def imports(tree: ast.AST) -> set[str]:
  """Dotted names of all that a file imports, at any depth; `from a import b` counts as a and as a.b.

  adapt_jax.models and adapt_jax.configs have the names of their folders here: models and configs.
  """
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      found |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
  return {re.sub(r'^adapt_jax\.(models|configs)\b', r'\1', name) for name in found}


def imported_files(name: str) -> set[str]:
  """Our own files that a file imports directly."""
  paths = [module.replace('.', '/') for module in imports(SOURCES[name])]
  return {file for p in paths for file in (f'{p}.py', f'{p}/__init__.py') if file in SOURCES} - {name}


def importers(package: str) -> set[str]:
  """Our files, tests aside, that import a package."""
  return {name for name in OURS if package in {i.split('.')[0] for i in imports(SOURCES[name])}}


def within(names: set[str], *places: str) -> bool:
  return all(name.startswith(places) for name in names)


def test_the_scan_sees_the_project() -> None:
  assert {'main.py', 'configs/base.py', 'adapt_jax/pruning/plan.py', 'models/network/llama.py'} <= set(
    SOURCES
  )
  assert imports(ast.parse('def f():\n  from jax import numpy\n  import os.path')) == {
    'jax',
    'jax.numpy',
    'os.path',
  }
  assert 'adapt_jax/pruning/plan.py' in imported_files('adapt_jax/pruning/surgery.py')


def test_imports_go_down() -> None:
  assert not importers('main')
  assert within(importers('configs'), 'configs/')
  assert within(importers('adapt_jax'), 'main.py', 'configs/', 'adapt_jax/', 'scripts/')
  tops = {name.removesuffix('.py').replace('/', '.') for name in TOP}
  below = set(OURS) - {*TOP, 'main.py'}
  assert not [name for name in below if tops & imports(SOURCES[name])]
  assert not importers('tests')
  assert not [
    f'{name}:{node.lineno} imports relatively, which hides the layer'
    for name in OURS
    for node in ast.walk(SOURCES[name])
    if isinstance(node, ast.ImportFrom) and node.level
  ]


def folder(module: str) -> str:
  """'pruning' of adapt_jax.pruning.plan; '' of a module that lies flat."""
  package, *parts = module.split('.')
  return parts[0] if parts and parts[0] in FOLDERS.get(package, ()) else ''


@pytest.mark.parametrize('package', FOLDERS)
def test_imports_go_down_by_folder(package: str) -> None:
  wrong, ranks = [], FOLDERS[package]
  for name in OURS:
    here = folder(name.removesuffix('.py').replace('/', '.')) if name.startswith(f'{package}/') else ''
    used = {folder(i) for i in imports(SOURCES[name]) if i.startswith(f'{package}.')} - {''}
    wrong += [f'{name} imports {up}' for up in used if here and ranks.index(up) < ranks.index(here)]
  assert not wrong


@pytest.mark.parametrize('package', FOLDERS)
def test_every_module_has_a_folder(package: str) -> None:
  """What lies flat is what all folders share: the package itself and, in models, four modules."""
  flat = {name for name in OURS if name.startswith(f'{package}/') and name.count('/') == 1}
  shared = {'models': {f'models/{name}.py' for name in ('config', 'errors', 'families', 'files')}}
  assert flat == shared.get(package, {'adapt_jax/__init__.py', *TOP})
  folders = {name.split('/')[1] for name in OURS if name.startswith(f'{package}/') and name.count('/') > 1}
  assert folders == set(FOLDERS[package])


def test_flat_modules_of_models_import_no_folder() -> None:
  for name in ('models/config.py', 'models/errors.py', 'models/families.py', 'models/files.py'):
    assert not {folder(i) for i in imports(SOURCES[name])} - {''}


def test_no_import_cycle() -> None:
  graphlib.TopologicalSorter({name: imported_files(name) for name in SOURCES}).prepare()


def test_heavy_imports_have_one_place() -> None:
  assert within(importers('transformers'), *TOKENIZER_FILES)
  assert within(importers('ml_collections'), 'adapt_jax/cli.py', 'configs/')
  assert not importers('torch')
  for tracker in ('tensorboard', 'wandb'):
    assert within(importers(tracker), f'adapt_jax/reports/{tracker}.py')
  assert within(importers('lm_eval'), 'adapt_jax/evaluation/')


@pytest.mark.parametrize('name', NO_JAX)
def test_planning_never_reaches_jax(name: str) -> None:
  seen, queue = set(), [name]
  while queue:
    file = queue.pop()
    seen.add(file)
    assert not {'jax', 'jaxlib', 'flax'} & {i.split('.')[0] for i in imports(SOURCES[file])}, (
      f'{name} through {file}'
    )
    queue += imported_files(file) - seen


def test_third_party_imports_are_declared() -> None:
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = project['optional-dependencies']
  optional = ('tensorboard', 'wandb', 'eval', 'quantise')
  lines = [*project['dependencies'], *(line for extra in optional for line in extras[extra])]
  declared = {re.split(r'[\[<>=~]', line)[0].replace('_', '-').lower() for line in lines}
  ours = {name.split('/')[0].removesuffix('.py') for name in SOURCES}
  used = {i.split('.')[0] for name in OURS for i in imports(SOURCES[name])} - sys.stdlib_module_names - ours
  providers = importlib.metadata.packages_distributions()
  missing = {i for i in used if not declared & {d.replace('_', '-').lower() for d in providers.get(i, ())}}
  assert not missing


def test_fetching_the_demo_needs_only_python() -> None:
  """`make fetch` runs before anything is installed."""
  code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import scripts.demo_files'
  subprocess.run([sys.executable, '-I', '-S', '-c', code], check=True)


def test_models_and_configs_are_imported_inside_the_package() -> None:
  """An installed package has one name at the top: a user's own models/ and configs/ are others."""
  wrong = re.compile(r'^\s*(?:from|import) (?:models|configs)\b', re.M)
  assert not [name for name in SOURCES if wrong.search((ROOT / name).read_text(encoding='utf-8'))]


@pytest.mark.parametrize('name', OURS)
def test_a_file_is_small_and_says_what_it_is(name: str) -> None:
  lines = len((ROOT / name).read_text(encoding='utf-8').splitlines())
  assert lines < MAX_LINES
  assert lines == 0 or ast.get_docstring(SOURCES[name])


@pytest.mark.parametrize('name', SOURCES)
def test_no_bare_except_and_no_pickle(name: str) -> None:
  for node in ast.walk(SOURCES[name]):
    if isinstance(node, ast.ExceptHandler):
      assert node.type, f'line {node.lineno}: a bare except'
    if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
      assert ast.unparse(node.value) == 'False', f'line {node.value.lineno}: allow_pickle'
  assert not PICKLES & {i.split('.')[0] for i in imports(SOURCES[name])}


def test_no_file_names_a_machine() -> None:
  if not (ROOT / '.git').exists():
    pytest.skip('not a git checkout')
  git = ['git', '-c', f'safe.directory={ROOT}', '-C', str(ROOT), 'ls-files', '-z']
  names = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split('\0')
  machine = re.compile(r'(?<![\w.~/:*-])/(?:work|root|home|Users|tmp|opt|mnt|srv)/\w')
  wrong = []
  for name in filter(None, names):
    path = ROOT / name
    if path.is_file() and b'\0' not in (content := path.read_bytes()):
      wrong += [f'{name}: {found}' for found in machine.findall(content.decode('utf-8', 'replace'))]
  assert not wrong
