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
OUTSIDE = [
  runs.ROOT / page for page in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'benchmarks/RESULTS.md')
]
WRITTEN = [*DOCS.glob('*.md'), *DOCS.glob('notes/*.md')]


def test_the_page_of_options_is_what_the_declarations_say():
  page = (DOCS / 'options.md').read_text(encoding='utf-8')
  assert page == cli_help.options_page(), 'python -m adapt_jax.cli_help > docs/options.md'


def test_every_page_is_in_the_menu():
  menu = set(re.findall(r': ([\w/-]+\.md)$', (runs.ROOT / 'mkdocs.yml').read_text(), re.MULTILINE))
  pages = {str(path.relative_to(DOCS)) for path in WRITTEN}
  assert {page for page in menu if not page.startswith('files/')} == pages


@pytest.mark.parametrize('path', [*OUTSIDE, *WRITTEN], ids=lambda path: path.name)
def test_links_lead_to_files_and_their_headings(path):
  for link in re.findall(r'\]\(([^)#]+)', path.read_text(encoding='utf-8')):
    assert link.startswith('http') or (path.parent / link).is_file(), link
  for link, anchor in re.findall(r'\]\(((?!http)[^)#]*)#([^)]+)\)', path.read_text(encoding='utf-8')):
    page = (path.parent / link if link else path).read_text(encoding='utf-8')
    headings = [x.lower() for x in re.findall(r'^#+ (.+)$', page, re.MULTILINE)]
    assert anchor in {re.sub(r'[^\w -]', '', x).replace(' ', '-') for x in headings}, anchor


def sentences(page):
  """Prose without code, tables, links' targets and names such as OLMo 2."""
  page = re.sub(r'^```.*?^```', '', page, flags=re.MULTILINE | re.DOTALL)
  page = re.sub(r'^(?: {4,}\S| *\|).*$', '', page, flags=re.MULTILINE)
  page = re.sub(r'\]\([^)]*\)|`[^`]*`|<[^>]+>|\b[A-Z]\w+ \d(\.\d)?\b(?! %)', '', page)
  page = re.sub(r'\n(?=#|\s*[-*] |\s*\d+\. |\n)', '.\n\n', page)
  return [' '.join(part.split()) for part in re.split(r'(?<=[.:;!?])\s+', page)]


READ = [*OUTSIDE[:3], *(path for path in DOCS.glob('*.md') if path.name != 'options.md')]  # it is generated


@pytest.mark.parametrize('path', READ, ids=lambda path: path.name)
def test_sentences_are_plain(path):
  """At most three numbers in a sentence (more belong in a table), and no phrase that hides its meaning."""
  for sentence in sentences(path.read_text(encoding='utf-8')):
    numbers = re.findall(r'(?<![\w.,-])\d[\d,.]*(?!\w*-)', sentence)
    assert len(numbers) < 4, sentence
    assert not re.search(r"\bth(at|ose) of\b|\btoday's program\b|\bby hand\b", sentence, re.I), sentence


PAGES = [runs.ROOT / 'README.md', *DOCS.glob('*.md'), *(runs.ROOT / 'launch').iterdir()]


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_options_modes_and_files_that_are_named_exist(path):
  text, options = path.read_text(encoding='utf-8'), flatten(defaults())
  assert set(re.findall(r'--config\.([a-z_.]+)=', text)) <= options.keys()
  assert set(re.findall(r'--mode=([a-z]+)', text)) <= MODES.keys()
  short = [
    found.replace('\\', '').split()
    for found in re.findall(r'^ {4,}(adapt-jax [a-z](?:.*\\\n)*.*)', text, re.M)
  ]
  for argument in (argument for command in short for argument in cli_help.written_out(command)[1:]):
    assert argument.startswith(('--config', '--mode=', '--workdir=', '--prompt=')), argument
  for name in re.findall(r'(?<![\w/.-])(?:configs|launch|adapt_jax)/[\w./]*\w', text):
    assert (runs.ROOT / name).exists(), name


@pytest.mark.parametrize('page', ['README.md', 'docs/index.md'])
@pytest.mark.parametrize('on_a_cpu', [False, True])
def test_the_first_command_can_train(page, on_a_cpu):
  """Its tokens suffice for its stages, and so do those that the page advises for CPUs."""
  text = (runs.ROOT / page).read_text(encoding='utf-8')
  command, rest = text[text.index('adapt-jax accel ') :].split('\n\n', 1)

  def read(words):
    flags = ' '.join(cli_help.written_out(words))
    return dict(re.findall(r'config\.((?:prune|train)\.\w+)=([\d._]+)', flags))

  words = command.replace('\\', '').split()
  numbers = read(words)
  assert len(numbers) == 2
  if on_a_cpu:
    numbers |= read([*words[:2], *rest.split('On a CPU begin with')[1].split('`')[1].split()])
    assert numbers['train.tokens'] == '100_000' and 'train.batch' in numbers
  values = base.get_config()
  values.update_from_flattened_dict({name: ast.literal_eval(value) for name, value in numbers.items()})
  check_run(from_dict(values.to_dict()), tiny_config(max_position=1024))


def build(site, *options):
  """What `make docs` runs, into `site`."""
  command = re.search(r'-m (mkdocs build.*)', (runs.ROOT / 'Makefile').read_text())[1].split()
  command = [sys.executable, '-m', *command, *options, '--site-dir', str(site)]
  environment = os.environ | {'NO_MKDOCS_2_WARNING': '1'}
  return subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True)


with_mkdocs = pytest.mark.skipif(importlib.util.find_spec('mkdocs') is None, reason="pip install '.[docs]'")


@with_mkdocs
@pytest.mark.end_to_end
def test_the_site_builds_without_a_warning_with_the_files_that_pages_link_to(tmp_path):
  built = build(tmp_path / 'site')
  assert built.returncode == 0, built.stderr
  page = (tmp_path / 'site/api/index.html').read_text()
  assert 'Calibration rows' in page and 'recover' in page  # docstrings of the library
  page = (tmp_path / 'site/which-size/index.html').read_text()
  assert '<span class="word">--max_tokens=8192</span>' in page  # not broken
  for page, linked in (
    ('index.html', 'files/CHANGELOG/'),
    ('results/index.html', '../files/benchmarks/RESULTS/'),
    ('files/benchmarks/RESULTS/index.html', '../../../notes/compilers/'),
    ('library/index.html', '../files/examples/prune_and_recover.ipynb'),
    ('results/index.html', 'covering/compare.csv'),
    ('running/index.html', '../sample-report.html'),
  ):
    assert f'href="{linked}"' in (tmp_path / 'site' / page).read_text(), linked
    file = (tmp_path / 'site' / page).parent / linked.split('#')[0]
    assert file.is_file() or (file / 'index.html').is_file(), linked


@with_mkdocs
@pytest.mark.end_to_end
@pytest.mark.parametrize('link', ['missing.md', '#nowhere', 'folder', '../adapt_jax'])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path, link):
  (tmp_path / 'docs').mkdir()
  (tmp_path / 'docs/index.md').write_text(f'# Page\n\n[a link]({link})\n')
  (tmp_path / 'docs/site.css').touch()
  (tmp_path / 'mkdocs.yml').write_text(
    f'INHERIT: {runs.ROOT}/mkdocs.yml\ndocs_dir: docs\nhooks: [{DOCS}/site.py]\n'
    'plugins: []\nnav: [index.md]\n'
  )
  built = build(tmp_path / 'site', '--config-file', str(tmp_path / 'mkdocs.yml'))
  assert built.returncode == 1 and link.strip('./#') in built.stderr
