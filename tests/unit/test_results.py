"""The tables of the results are what the studies' stored tables say."""

import csv
import re

import pytest

from tests.support import runs

DOCS = runs.ROOT / 'docs'


def stored(study):
  """All fractional numbers of a study's table."""
  cells = []
  for path in (DOCS / 'results' / study).glob('*.csv'):
    with open(path, encoding='utf-8') as file:
      cells += [cell for row in csv.reader(file) for cell in row]
  return [float(cell) for cell in cells if re.fullmatch(r'-?\d+\.\d+(e-?\d+)?', cell)]


@pytest.mark.parametrize(
  'page, section, decimals, studies',
  [
    ('results.md', 'Is the default better than other methods?', 2, ['methods_table']),
    ('results.md', 'Which calibration text?', 3, ['own']),
    ('results.md', 'Which loss?', 3, ['loss', 'control', 'qwen']),
    ('results.md', 'What does pruning cost, and what comes back?', 3, ['tokens', 'interleave', 'hidden']),
    ('hidden-size.md', 'What it costs', 3, ['hidden']),
    ('which-size.md', 'Measured', 3, ['frontier']),
    ('../README.md', '', 2, ['family']),
    ('../README.md', '', 1, ['frontier']),
  ],
)
def test_figures_are_those_of_the_studies(page, section, decimals, studies):
  """Rows of models before training are left out: the stored tables have them for the first text only."""
  text = (DOCS / page).read_text(encoding='utf-8')
  text = (text.split(f'\n## {section}\n')[1] if section else text).split('\n## ')[0]
  rows = [
    row for row in re.findall(r'^\|.*', text, re.MULTILINE) if not re.search(r'\| (none|pruned) \|', row)
  ]
  shown = re.findall(rf'-?\d+\.\d{{{decimals}}}(?!\d)', '\n'.join(rows))
  known = {f'{value:.{decimals}f}' for study in studies for value in stored(study)}
  assert shown and set(shown) <= known, sorted(set(shown) - known)
