"""The documentation: what is generated is up to date, every page is in the menu, and the site builds."""

import ast
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from adapt_jax import cli_help
from adapt_jax.config.build import defaults, flatten, from_dict
from adapt_jax.configs import base
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.checks import check_run
from tests.support import runs
from tests.support.helpers import tiny_config

DOCS = runs.ROOT / 'docs'


def test_the_page_of_options_is_what_the_declarations_say():
  page = (DOCS / 'options.md').read_text(encoding='utf-8')
  assert page == cli_help.options_page(), 'python -m adapt_jax.cli_help > docs/options.md'


def test_every_page_is_in_the_menu():
  menu = set(re.findall(r'[\w-]+\.md', (runs.ROOT / 'mkdocs.yml').read_text()))
  assert menu == {path.name for path in DOCS.glob('*.md')}


@pytest.mark.parametrize('path', [runs.ROOT / 'README.md', runs.ROOT / 'CONTRIBUTING.md', *DOCS.glob('*.md')])
def test_links_lead_to_files_and_their_headings(path):
  for link in re.findall(r'\]\(([^)#]+)', path.read_text(encoding='utf-8')):
    assert link.startswith('http') or (path.parent / link).exists(), link
  for link, anchor in re.findall(r'\]\(((?!http)[^)#]*)#([^)]+)\)', path.read_text(encoding='utf-8')):
    page = (path.parent / link if link else path).read_text(encoding='utf-8')
    headings = [x.lower() for x in re.findall(r'^#+ (.+)$', page, re.MULTILINE)]
    assert anchor in {re.sub(r'[^\w -]', '', x).replace(' ', '-') for x in headings}, anchor


PAGES = [runs.ROOT / 'README.md', *DOCS.glob('*.md'), *(runs.ROOT / 'launch').iterdir()]


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_options_modes_and_files_that_are_named_exist(path):
  text, options = path.read_text(encoding='utf-8'), flatten(defaults())
  assert set(re.findall(r'--config\.([a-z_.]+)=', text)) <= options.keys()
  assert set(re.findall(r'--mode=([a-z]+)', text)) <= MODES.keys()
  for name in re.findall(r'(?<![\w/.-])(?:configs|launch|adapt_jax)/[\w./]*\w', text):
    assert (runs.ROOT / name).exists(), name


@pytest.mark.parametrize('page', ['README.md', 'docs/index.md'])
@pytest.mark.parametrize('on_a_cpu', [False, True])
def test_the_first_command_can_train(page, on_a_cpu):
  """Its tokens suffice for its stages, and so do those that the page advises for CPUs."""
  text = (runs.ROOT / page).read_text(encoding='utf-8')
  command, rest = text.split('adapt-jax --config=base --workdir=out/run', 1)[1].split('evaluate.source=', 1)
  numbers = dict(re.findall(r'config\.((?:prune|train)\.\w+)=([\d._]+)', command))
  if on_a_cpu:
    numbers |= re.findall(r'\b(train\.\w+)=([\d_]+)', rest.split('On a CPU begin with')[1].split('. ')[0])
    assert numbers['train.tokens'] == '100_000'
  values = base.get_config()
  values.update_from_flattened_dict({name: ast.literal_eval(value) for name, value in numbers.items()})
  check_run(from_dict(values.to_dict()), tiny_config(max_position=1024))


@pytest.mark.skipif(importlib.util.find_spec('mkdocs') is None, reason="pip install '.[docs]'")
@pytest.mark.end_to_end
def test_the_site_builds_without_a_warning(tmp_path):
  command = [sys.executable, '-m', 'mkdocs', 'build', '-q', '--strict', '--site-dir', str(tmp_path / 'site')]
  environment = os.environ | {'NO_MKDOCS_2_WARNING': '1'}
  built = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True)
  assert built.returncode == 0, built.stderr
  page = (tmp_path / 'site/api/index.html').read_text()
  assert 'Calibration rows' in page and 'recover' in page  # docstrings of the library
