"""Charts: sound, the same each time, in both themes; what cannot be drawn is left out."""

import json
import math
import re
from xml.etree import ElementTree

import pytest

from adapt_jax.reports import charts
from adapt_jax.reports.charts import Series
from adapt_jax.reports.table import Table
from scripts import plot_report, plot_tokens
from tests.unit.test_run_page import make_report

ODD = '<&"$x$'


def texts(chart):
  return [
    ''.join(e.itertext()) for e in ElementTree.fromstring(chart[chart.index('<svg') :]).iter() if e.text
  ]


def test_names_are_drawn_as_they_are_and_charts_are_the_same_each_time():
  def draw():
    lines = [
      Series(ODD, [(0, 1.0), (1, 30.0)], ranges=[(1, 20.0, 40.0)]),
      Series('b', [(0, 2.0)], dashed=True),
    ]
    return (
      charts.line_chart(
        ODD, ('x', 'y'), lines, marks=[(0, ODD)], levels=[(1, ODD)], log=True, x_range=(0, 2)
      ),
      charts.line_chart(ODD, ('x', 'y'), lines, categories=[ODD, 'two'], most=10),
      charts.bar_chart(ODD, 'channels', [0], [0], ('<x>', '&y'), 0, 180),
      charts.heat_map(ODD, [[1.0, math.nan], [2.0, math.inf]], [1, 5], most=1.5),
    )

  for chart, again in zip(draw(), draw(), strict=True):
    assert chart == again and ODD in texts(chart)


@pytest.mark.filterwarnings('error')
def test_names_in_letters_that_the_measuring_font_lacks_are_drawn_without_a_warning():
  assert '维基' in texts(charts.line_chart('维基', ('x', 'y'), [Series('', [(0, 1.0)])]))


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


def brightness(colour):
  """Of #rrggbb, as WCAG 2 has it."""
  shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
  return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize('theme', [0, 1])
def test_colours_stand_out_from_the_paper_and_differ(theme):
  colours = {name: pair[theme] for name, pair in charts.PALETTE.items() if re.fullmatch(r'c\d|ink', name)}
  assert len(set(colours.values())) == len(colours) == charts.COLOURS + 1
  for colour in colours.values():
    low, high = sorted(map(brightness, (colour, charts.PALETTE['paper'][theme])))
    assert (high + 0.05) / (low + 0.05) >= 3  # WCAG 2 for graphics


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


def test_the_picture_for_the_readme(tmp_path, capsys):
  out, report = tmp_path / 'out.svg', make_report()
  (tmp_path / 'report.json').write_text(json.dumps(report))
  assert plot_report.main(['', str(tmp_path), str(out)]) == 0
  for title in ('Perplexity on held-out text', 'MLP channels, after stage 2', 'KV heads, after stage 2'):
    assert title in texts(out.read_text())
  out.unlink()
  for report in ({'models': {}}, {'model': {}, 'stages': [{}]}):  # of mode bench; of no use
    (tmp_path / 'report.json').write_text(json.dumps(report))
    assert plot_report.main(['', str(tmp_path), str(out)]) == 2
  assert capsys.readouterr().err.count('error: ') == 2 and not out.exists()


def write_cell(workdir, name, tokens, **recovered):
  text = {'dense': 10.0, 'pruned': 20.0} | recovered
  report = {'stages': [{'tokens': tokens // 2}, {'tokens': tokens - tokens // 2}], 'texts': {'web': text}}
  (workdir / 'cells' / name).mkdir(parents=True)
  (workdir / 'cells' / name / 'report.json').write_text(json.dumps(report))


def test_a_line_goes_from_the_pruned_model_through_the_cells_by_their_tokens(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(charts, 'line_chart', lambda *args, **_: drawn.append(args) or '<svg/>')
  write_cell(tmp_path, 'long', 1001, recovered=12.5)
  write_cell(tmp_path, 'base', 100, recovered=15.0)
  assert plot_tokens.main([str(tmp_path), str(tmp_path / 'out.svg')]) == 0
  ((_, _, (series,)),) = drawn
  expected = [(0, math.log(2)), (100, math.log(1.5)), (1001, math.log(1.25))]
  assert series.name == 'web' and series.points == [pytest.approx(point) for point in expected]


@pytest.mark.parametrize('cells', [[], ['pruned only']])
def test_a_grid_without_recovered_models_is_refused_and_writes_nothing(tmp_path, capsys, cells):
  for name in cells:
    write_cell(tmp_path, name, 0)
  assert plot_tokens.main([str(tmp_path), str(tmp_path / 'out.svg')]) == 2
  assert capsys.readouterr().err.startswith('error: ') and not (tmp_path / 'out.svg').exists()
