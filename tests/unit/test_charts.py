"""Charts: sound, the same each time, in both themes; what cannot be drawn is left out."""

import math
import re
from xml.etree import ElementTree

import pytest

from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.table import Table

ODD = '<&"$x$维'  # one letter is not in the font that measures


def texts(chart):
  return [
    ''.join(e.itertext()) for e in ElementTree.fromstring(chart[chart.index('<svg') :]).iter() if e.text
  ]


@pytest.mark.filterwarnings('error')
def test_names_are_drawn_as_they_are_and_charts_are_the_same_each_time():
  lines = [
    Series(ODD, [(0, 1.0), (1, 30.0)], ranges=[(1, 20.0, 40.0)]),
    Series('b', [(0, 2.0)], dashed=True),
  ]
  marked = {'marks': [(0, ODD)], 'levels': [(1, ODD)], 'log': True, 'x_range': (0, 2)}

  def draw():
    return (
      charts.line_chart(ODD, ('x', 'y'), lines, **marked),
      charts.line_chart(ODD, ('x', 'y'), lines, categories=[ODD, 'two'], most=10),
      charts.bar_chart(ODD, 'channels', {'<x>': [0], '&y': [0]}, 0, 180),
      charts.heat_map(ODD, [[1.0, math.nan], [2.0, math.inf]], [1, 5], most=1.5),
    )

  for chart, again in zip(draw(), draw(), strict=True):
    assert chart == again and ODD in texts(chart)


def test_what_is_not_finite_is_left_out():
  assert charts.line_chart('a', ('x', 'y'), [Series('s', [(0, math.nan)])]) == ''
  assert charts.heat_map('a', [[math.inf]], [1]) == ''
  assert 'nan' not in charts.line_chart(
    'a', ('x', 'y'), [Series('', [(0, 1.0), (1, math.inf)])], levels=[(math.inf, '')]
  )


def test_a_chart_on_a_page_has_the_colours_of_the_theme():
  chart = charts.line_chart('a', ('x', 'y'), [Series('s', [(0, 1.0)], i) for i in range(9)])
  assert chart.startswith('<?xml') and charts.PALETTE['c7'][0] in chart and 'var(' not in chart
  part = charts.inline(chart)
  assert part.startswith('<svg') and 'var(--c7)' in part and 'var(--paper)' in part
  assert not {light for light, _ in charts.PALETTE.values()} & set(re.findall('#[0-9a-f]{6}', part))
  assert all(f'--{name}:{dark}' in charts.css() for name, (_, dark) in charts.PALETTE.items())


@pytest.mark.parametrize(
  'value, text', [(2e-4, '0.0002'), (450, '450'), (2e4, '20k'), (1.2e8, '120M'), (0, '0')]
)
def test_numbers_of_axes_are_short(value, text):
  assert charts.number(value) == text


def test_far_values_do_not_flatten_the_others():
  assert charts.axis_end([1.0, 2.0, 3.0, 3.0, 1e6, math.nan]) == 12.0


def test_tables_escape_their_cells():
  table = Table(['a|b', '<c>'], [['x|y', None], [1, 'p, "q"']])
  assert table.markdown() == '| a\\|b | <c> |\n| --- | --- |\n| x\\|y |  |\n| 1 | p, "q" |'
  assert '<th>&lt;c&gt;</th>' in table.html() and '<td></td>' in table.html()
  assert table.csv() == 'a|b,<c>\nx|y,\n1,"p, ""q"""\n'
