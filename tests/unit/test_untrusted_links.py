"""Links planted in a workdir, under the names of our temporary files, lead no write to another place."""

import os

import pytest

from adapt_jax.models.files import new_directory, new_file, write_text


@pytest.fixture
def precious(tmp_path):
  """A file elsewhere, that must keep its content."""
  (tmp_path / 'elsewhere').mkdir()
  path = tmp_path / 'elsewhere/precious'
  path.write_text('kept')
  yield path
  assert path.read_text() == 'kept' and [p.name for p in path.parent.iterdir()] == ['precious']


@pytest.fixture
def out(tmp_path):
  (tmp_path / 'out').mkdir()
  return tmp_path / 'out'


def write_page(path):
  write_text(path, 'page')


def write_file(path):
  with new_file(path) as new, open(new, 'w') as file:
    file.write('page')


@pytest.mark.parametrize('write', [write_page, write_file])
@pytest.mark.parametrize('target', ['precious', 'new', '.'])
def test_a_link_planted_as_the_temporary_file(precious, out, write, target):
  (out / '.report.html.tmp').symlink_to(precious.parent / target)
  write(out / 'report.html')
  assert (out / 'report.html').read_text() == 'page' and not (out / 'report.html').is_symlink()
  assert os.listdir(out) == ['report.html']


@pytest.mark.parametrize('write', [write_page, write_file])
def test_a_directory_and_a_pipe_under_the_temporary_name(out, write):
  (out / '.report.html.tmp').mkdir()
  write(out / 'report.html')
  os.mkfifo(out / '.report.html.tmp')
  write(out / 'report.html')
  assert (out / 'report.html').read_text() == 'page' and os.listdir(out) == ['report.html']


@pytest.mark.parametrize('name', ['.hf.tmp', 'hf'])
@pytest.mark.parametrize('target', ['precious', '.', 'nothing'])
def test_a_link_planted_as_the_directory_of_an_export(precious, out, name, target):
  (out / name).symlink_to(precious.parent / target)
  with new_directory(out / 'hf') as new:
    (new / 'config.json').write_text('{}')
  assert not (out / 'hf').is_symlink() and os.listdir(out / 'hf') == ['config.json']
  assert os.listdir(out) == ['hf']
