"""The wheel, installed: one package, which works beside a user's own models/ and configs/."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.support import runs

FILES = ('adapt_jax', 'models', 'configs', 'pyproject.toml', 'README.md', 'LICENSE')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built from a copy: a build leaves files behind."""
  path = tmp_path_factory.mktemp('wheel')
  source = path / 'source'
  source.mkdir()
  for name in FILES:
    place, ignored = runs.ROOT / name, shutil.ignore_patterns('__pycache__', '*.egg-info')
    if place.is_dir():
      shutil.copytree(place, source / name, symlinks=True, ignore=ignored)
    else:
      shutil.copy(place, source / name)
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '-q', '--no-deps']
  subprocess.run([*pip, '--wheel-dir', str(path), str(source)], check=True)
  (found,) = path.glob('adapt_jax-*.whl')
  return found


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """Where the wheel is unpacked, before all else on the path of a process with `environment`."""
  path = tmp_path_factory.mktemp('installed')
  zipfile.ZipFile(wheel).extractall(path)
  return path


@pytest.fixture
def place(tmp_path):
  """A project with packages of its own of the same names."""
  for name in ('models', 'configs'):
    (tmp_path / name).mkdir()
    (tmp_path / name / '__init__.py').write_text('raise AssertionError("the user\'s own")\n')
  return tmp_path


def python(installed, place, *arguments):
  """Runs Python in the project, which is on its path too, as in a notebook."""
  environment = os.environ | {'PYTHONPATH': os.pathsep.join((str(place), str(installed)))}
  command = [sys.executable, *arguments]
  return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def test_the_wheel_has_one_package_with_all_that_it_needs(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  tops = {pathlib.PurePosixPath(name).parts[0] for name in names}
  assert {top for top in tops if not top.endswith('.dist-info')} == {'adapt_jax'}
  needed = ('cli.py', 'configs/demo.py', 'models/network/llama.py', 'export/card.jinja')
  assert {f'adapt_jax/{name}' for name in needed} <= set(names)
  assert not [name for name in names if 'tests' in name]


def test_the_command_runs_a_recipe_by_name_beside_the_users_own_packages(installed, place):
  files = runs.make_files(place / 'files')
  command = 'import adapt_jax; print(adapt_jax.__file__); from adapt_jax.cli import run; run()'
  flags = ['--mode=evaluate', '--config=base', f'--config.model.source={files / "model"}', '--workdir=out']
  flags += [f'--config.evaluate.source={files / "valid.txt"}', '--config.evaluate.length=32']
  result = python(installed, place, '-c', command, *flags)
  assert result.returncode == 0, result.stderr
  assert runs.read_report(place / 'out')['health']['answers'] == 40
  assert result.stdout.startswith(str(installed))


def test_version_and_help_say_what_there_is(installed, place):
  (place / 'base').mkdir()  # as a workdir may be named: no recipe
  command = ('-c', 'from adapt_jax.cli import run; run()')
  version = python(installed, place, *command, '--version')
  assert version.returncode == 0 and version.stdout.startswith('adapt-jax 0.')
  usage = python(installed, place, *command, '--help').stdout
  for word in ('--config=RECIPE', 'llama_8b_to_1_5b', 'sensitivity'):
    assert word in usage
  fields = python(installed, place, *command, '--config=base', '--mode=evaluate', '--help').stdout
  assert '--config.evaluate.length=1024' in fields and '--config.prune.target' not in fields
