"""House rules that a program can check: imports go down only, files stay small."""

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
NO_JAX = ('adapt_jax/pruning/widths.py', 'adapt_jax/pruning/plan.py', 'adapt_jax/pruning/methods/__init__.py')
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


def folder(name: str) -> str:
  """The folder of a file or module: 'pruning' of adapt_jax/pruning/plan.py; '' of one that lies flat."""
  package, *parts = re.split(r'[./]', name.removesuffix('.py'))
  return parts[0] if parts and parts[0] in FOLDERS.get(package, ()) else ''


@pytest.mark.parametrize('package', FOLDERS)
def test_imports_go_down(package: str) -> None:
  ranks = FOLDERS[package]
  wrong = [
    f'{name} imports {up}'
    for name in OURS
    if name.startswith(f'{package}/') and (here := folder(name))
    for up in {folder(i) for i in imports(SOURCES[name]) if i.startswith(f'{package}.')} - {''}
    if ranks.index(up) < ranks.index(here)
  ]
  assert not wrong


def test_below_the_top_nothing_imports_the_command_or_the_library() -> None:
  flat = {name for name in OURS if name.startswith('adapt_jax/') and name.count('/') == 1}
  tops = {name.removesuffix('.py').replace('/', '.') for name in flat - {'adapt_jax/__init__.py'}}
  assert 'adapt_jax.cli' in tops
  assert not [name for name in {*OURS} - flat - {'main.py'} if tops & imports(SOURCES[name])]
  assert all(name.startswith('configs/') for name in importers('configs'))
  assert not [name for name in importers('adapt_jax') if name.startswith('models/')]


def test_no_import_cycle() -> None:
  graphlib.TopologicalSorter({name: imported_files(name) for name in SOURCES}).prepare()


def test_heavy_imports_have_one_place() -> None:
  assert all(name.startswith('models/formats/') for name in importers('transformers'))
  assert all(name.startswith(('adapt_jax/cli.py', 'configs/')) for name in importers('ml_collections'))
  assert not importers('torch')
  assert all(name.startswith('adapt_jax/evaluation/') for name in importers('lm_eval'))


@pytest.mark.parametrize('name', NO_JAX)
def test_planning_never_reaches_jax(name: str) -> None:
  seen, queue = set(), [name]
  while queue:
    file = queue.pop()
    seen.add(file)
    reached = {i.split('.')[0] for i in imports(SOURCES[file])}
    assert not {'jax', 'jaxlib', 'flax'} & reached, f'{name} through {file}'
    queue += imported_files(file) - seen


def test_third_party_imports_are_declared() -> None:
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  lines = [
    *project['dependencies'],
    *(x for extra in project['optional-dependencies'].values() for x in extra),
  ]
  declared = {re.split(r'[\[<>=~]', line)[0].replace('_', '-').lower() for line in lines}
  ours = {name.split('/')[0].removesuffix('.py') for name in SOURCES}
  used = {i.split('.')[0] for name in OURS for i in imports(SOURCES[name])} - sys.stdlib_module_names - ours
  providers = importlib.metadata.packages_distributions()
  missing = {i for i in used if not declared & {d.replace('_', '-').lower() for d in providers.get(i, ())}}
  assert not missing


@pytest.mark.end_to_end
def test_fetching_the_demo_needs_only_python() -> None:
  """`make fetch` runs before anything is installed."""
  code = f'import sys; sys.path.insert(0, {str(ROOT)!r}); import scripts.demo_files'
  subprocess.run([sys.executable, '-I', '-S', '-c', code], check=True)


def test_models_and_configs_are_imported_inside_the_package() -> None:
  """An installed package has one name at the top: a user's own models/ and configs/ are others."""
  wrong = re.compile(r'^\s*(?:from|import) (?:models|configs)\b', re.M)
  assert not [name for name in SOURCES if wrong.search((ROOT / name).read_text(encoding='utf-8'))]


def test_files_are_small_and_say_what_they_are() -> None:
  for name in OURS:
    lines = len((ROOT / name).read_text(encoding='utf-8').splitlines())
    assert lines < MAX_LINES and (lines == 0 or ast.get_docstring(SOURCES[name])), name


def test_nothing_is_unpickled() -> None:
  """Loading a pickle runs code."""
  for name, tree in SOURCES.items():
    assert not {'pickle', 'cloudpickle', 'dill', 'shelve', 'joblib'} & imports(tree), name
    allowed = [n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == 'allow_pickle']
    assert all(ast.unparse(keyword.value) == 'False' for keyword in allowed), name


def test_no_file_names_a_machine() -> None:
  if not (ROOT / '.git').exists():
    pytest.skip('not a git checkout')
  git = ['git', '-c', f'safe.directory={ROOT}', '-C', str(ROOT), 'ls-files', '-z']
  names = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split('\0')
  machine = re.compile(r'(?<![\w.~/:*-])/(?:work|root|home|Users|tmp|opt|mnt|srv)/\w')
  wrong = []
  for path in (ROOT / name for name in names if name):
    if path.is_file() and b'\0' not in (content := path.read_bytes()):
      wrong += [f'{path}: {found}' for found in machine.findall(content.decode('utf-8', 'replace'))]
  assert not wrong
