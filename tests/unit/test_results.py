"""Tables and pictures of the pages are what the studies' stored tables say."""

import re

import pytest

from scripts import pictures, tables

PAGES = [tables.ROOT / 'README.md', *(tables.ROOT / 'docs').glob('*.md')]
MARKED = [path for path in PAGES if '<!-- table: ' in path.read_text(encoding='utf-8')]


@pytest.mark.parametrize('path', MARKED, ids=lambda path: path.name)
def test_tables_are_what_the_data_say(path):
  assert path.read_text(encoding='utf-8') == tables.filled(path), 'python -m scripts.tables'


def test_pictures_are_what_the_data_say():
  for name, picture in pictures.pictures().items():
    drawn = (tables.ROOT / 'docs' / name).read_text(encoding='utf-8')
    assert drawn == picture, f'{name}: python -m scripts.pictures'


def test_every_table_is_used_and_tells_where_its_figures_come_from():
  pages = {path.name: path.read_text(encoding='utf-8') for path in MARKED}
  assert set(re.findall('<!-- table: (.*) -->', ''.join(pages.values()))) == tables.TABLES.keys()
  below = re.findall(r'^\|.*\n\n(.*)', pages['results.md'], re.MULTILINE)
  assert below and all(line.startswith(('*Data: ', '*Typed in ')) for line in below)


def test_a_study_of_two_versions_or_none_is_refused():
  study = tables.Study('family')
  assert study.stamp() == study.rows[0]['version']
  study.rows[0]['version'] = '0.1.0'
  with pytest.raises(ValueError, match='unpack'):
    study.stamp()
  study.rows = [{**row, 'version': ''} for row in study.rows]
  with pytest.raises(ValueError, match='no version'):
    study.stamp()
