"""Tables, CSV, page and plots of mode compare, on figures made up for the test."""

import csv
import io
import math

import pytest

from adapt_jax.reports import charts, compare_page, compare_tables

TARGET, SAMPLES = 'prune.target', 'prune.calibration.samples'


def make_report(values, texts=('perplexity',), states=()):
  """A cell for each of `values`, finished unless `states` says otherwise."""
  cells = []
  for number, value in enumerate(values):
    cell = {'name': f'cell {number}', 'values': value, 'state': dict(states).get(number, 'finished')}
    if cell['state'] == 'finished':
      on = {name: {'dense': 10.0 + i, 'pruned': 20.0 + i + number} for i, name in enumerate(texts)}
      cell |= {'texts': on, 'params': 10**6 + 10**5 * number, 'seconds': 1.0, 'version': '1 (abc)'}
    elif cell['state'] == 'failed':
      cell |= {'error': 'it <broke>'}
    cells.append(cell)
  return {
    'model': {'source': 'a', 'params_before': 2 * 10**6}, 'fields': list(values[0]), 'over': 'seed',
    'of': 'cells', 'recover': False, 'cells': cells, 'definitions': ['exp'], 'seconds': 2.0,
    'compiles': {'scoring': 1},
    'scoring_passes': {'computed': 1, 'remembered': 0}, 'command': 'main.py <x>', 'versions': {'jax': '1'},
  }  # fmt: skip


GRID = [{TARGET: target, SAMPLES: samples} for target in (110602944.0, 0.5) for samples in (24, 128)]
SEEDS = [{TARGET: 0.5, 'seed': seed} for seed in (0, 1, 2)]


def test_a_row_for_each_group_with_the_spread_over_its_cells():
  tables = compare_tables.tables(make_report(SEEDS, states=[(2, 'failed')]))
  row = {}
  for table in tables.values():
    assert len(table.rows) == 1
    row |= dict(zip(table.head, table.rows[0], strict=True))
  assert list(tables) == ['Cells', 'Loss'] and row['target'] == '0.5' and row['cells'] == '2 of 3, 1 failed'
  assert row['Perplexity pruned'] == '20.50 (20.00–21.00)'
  assert row['Loss increase'] == f'{math.log(2.05):.3f} ({math.log(2.0):.3f}–{math.log(2.1):.3f})'
  assert row['parameters'] == '1,050,000 (1,000,000–1,100,000)' and row['KL'] == '–'


def test_usable_answers_stand_beside_those_of_the_dense_model():
  report = make_report(GRID)
  for cell in report['cells']:
    cell |= {'usable': 15, 'usable_dense': 29}
  assert 'The dense model has 29.' in compare_tables.text(report)
  (row, *_) = csv.DictReader(io.StringIO(compare_tables.cells_table(report).csv()))
  assert (float(row['usable']), float(row['usable_dense'])) == (15, 29)


def test_figures_say_which_of_several_texts_they_belong_to():
  report = make_report(GRID, ['wiki', 'web'])
  tables = compare_tables.tables(report)
  assert list(tables) == ['Cells', 'Loss increase', 'KL', 'Perplexity pruned']
  assert tables['Perplexity pruned'].head == ['target', 'samples', 'wiki', 'web']
  assert all(len(line) <= 80 for table in tables.values() for line in table.markdown().splitlines())
  assert 'perplexity wiki 10.00, web 11.00.' in compare_tables.text(report)
  assert set(compare_page.plots(report)) == {
    'perplexity.svg', 'perplexity-web.svg', 'perplexity-parameters.svg'
  }  # fmt: skip


def test_a_run_of_several_sizes_has_one_curve_a_text_from_the_dense_model_on(drawn):
  report = make_report([{TARGET: t} for t in (0.9, 0.8)], ['wiki', 'web']) | {'of': 'sizes'}
  assert compare_page.plots(report).keys() == {'loss.svg'}
  _, _, (wiki, web), _ = drawn[0]
  assert wiki.points[-1] == web.points[-1] == (100, 0) and len(wiki.points) == 3
  assert wiki.points[0] == (50, pytest.approx(math.log(2)))


def test_sizes_without_texts_and_texts_without_the_dense_model():
  """As of runs of several sizes that measure nothing, or whose health was switched on half way."""
  report = make_report(GRID, [])
  assert compare_page.plots(report) == {} and compare_tables.text(report)
  cell = report['cells'][0] | {'texts': {'own': {'kl': 0.5}}}
  assert compare_tables.figures(cell)['kl own'] == 0.5


def test_values_are_readable_in_the_table_and_exact_in_the_csv_file():
  report = make_report(GRID)
  assert '| 110,602,944 | 24 |' in compare_tables.text(report)
  rows = list(csv.DictReader(io.StringIO(compare_tables.cells_table(report).csv())))
  assert [rows[1][name] for name in ('cell', TARGET, SAMPLES)] == ['cell 1', '110602944.0', '128']
  assert float(rows[1]['perplexity_pruned']) == 21.0 and float(rows[1]['excess']) == math.log(2.1)
  assert rows[1]['kl'] == rows[1]['perplexity_recovered'] == '' and rows[1]['version'] == '1 (abc)'


def test_a_page_of_an_unfinished_grid(tmp_path):
  waiting = [(1, 'failed'), (2, 'running'), (3, 'waiting')]
  compare_page.write(tmp_path, make_report(GRID, states=[(0, 'waiting'), *waiting]), running=False)
  assert not list(tmp_path.glob('*.svg'))  # nothing to draw yet
  compare_page.write(tmp_path, make_report(GRID, states=waiting), running=False)
  page = (tmp_path / 'report.html').read_text()
  for words in ('1 of 4 cells finished', '1 failed', 'now cell 2', 'cell 1: it &lt;broke&gt;', '&lt;x&gt;'):
    assert words in page
  assert 'href="cells/cell 0/report.html"' in page
  assert 'cell 1: it <broke>' in (tmp_path / 'compare.md').read_text()


@pytest.fixture
def drawn(monkeypatch):
  """The arguments of the charts of perplexity."""
  calls = []
  monkeypatch.setattr(charts, 'line_chart', lambda title, *a, **k: calls.append((title, *a, k)) or '<svg/>')
  return calls


@pytest.mark.parametrize(
  'values, x, places',
  [
    ([{'prune.method': m} for m in ('a', 'b', 'c')], 'prune.method', [0, 1, 2]),
    ([{SAMPLES: n} for n in (8, 64, 512)], SAMPLES, [0, 1, 2]),  # wide: evenly spaced
    ([{SAMPLES: n} for n in (8, 16, 32)], SAMPLES, [8, 16, 32]),
    ([{'prune.method': 'a', TARGET: t} for t in (0.9, 0.8)], TARGET, [0.8, 0.9]),
    ([{'prune.method': m, SAMPLES: 8, 'seed': s} for m in 'a' for s in (1, 2)], SAMPLES, [8]),
  ],
)
def test_plots_are_over_the_target_or_the_first_number(drawn, values, x, places):
  compare_page.plots(make_report(values))
  _, (x_name, _), series, _ = drawn[0]
  assert x_name == x and [point[0] for point in series[0].points] == places


def test_lines_are_named_by_the_other_fields_and_a_broken_model_does_not_flatten_them(drawn):
  report = make_report([v | {'prune.method': m} for m in ('a', 'b') for v in GRID[:2]])
  report['cells'][0]['texts']['perplexity']['pruned'] = 1e9
  compare_page.plots(report)
  _, (_, y_name), series, _ = drawn[0]
  names = [f'samples {count}, {method}' for method in 'ab' for count in (24, 128)]
  assert [one.name for one in series] == names
  assert y_name == 'perplexity (up to 200)' and max(y for one in series for _, y in one.points) == 200


def test_the_fraction_kept_per_stage(drawn):
  """Fig. 4 of the paper."""
  compare_page.plots(make_report([{'prune.stages': n} for n in (1, 2)]))
  (kept,) = [call for call in drawn if call[1][0] == 'fraction kept per stage']
  assert kept[2][0].points == [(0.5, 20.0), (pytest.approx(0.55**0.5), 21.0)]
