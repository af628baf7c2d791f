"""Which files mode frontier advises: the frontier of points, the sentences, tables and page."""

import csv

import pytest

from adapt_jax.reports import frontier_page
from adapt_jax.reports.frontier import SAME_LOSS, frontier, mark, table, text, values


@pytest.mark.parametrize(
  'points, same_cost, expected',
  [
    ([(271, 0.0), (145, 0.0005), (105, 0.05), (90, 0.2)], 1.0, [3, 2, 1]),  # BF16 is no better than Q8_0
    ([(271, 0.0), (145, 2 * SAME_LOSS)], 1.0, [1, 0]),
    ([(100, 0.1), (100, 0.1), (100, 0.3)], 1.0, [0]),  # of equal ones the first
    ([(100, 0.3), (100, 0.1)], 1.0, [1]),
    ([(90, 0.3), (100, 0.3), (110, 0.4), (120, -0.1)], 1.0, [0, 3]),  # larger and not better
    # Costs that count as equal: the better one is taken, and 20 is compared with 18, not with 19.
    ([(18, 0.3), (18.5, 0.2), (19.5, 0.1)], 1.05, [1, 2]),
    ([(18, 0.1), (18.5, 0.3)], 1.05, [0]),
    ([], 1.0, []),
  ],
)
def test_points_of_the_frontier(points, same_cost, expected):
  assert frontier(points, same_cost) == expected


def make_row(model, kind, megabytes, loss, decode):
  spread = {'median': decode, 'min': decode - 1, 'max': decode + 1}
  figures = {'perplexity': 20.0, 'loss_increase': loss, 'kl': loss}
  return {
    'model': model, 'type': kind, 'source': 'out/run', 'params': 10, 'file': f'{kind}.gguf',
    'bytes': int(megabytes * 1e6), 'texts': {'web': figures}, 'loss_increase': loss, 'kl': loss,
    'prefill': spread, 'decode': spread, 'best_for': [],
  }  # fmt: skip


def make_report():
  rows = [
    make_row('dense', 'BF16', 271, 0.0, 10),
    make_row('dense', 'Q4_K_M', 104.2, 0.05, 21.39),
    make_row('80 %', 'Q8_0', 116, 0.19, 20),
    make_row('80 %', 'Q4_K_M', 89.9, 0.2, 25.55),
  ]
  return {
    'model': {'source': 'a/b', 'params_before': 12}, 'reference': 'the dense model in BF16', 'rows': rows,
    'advice': mark(rows), 'definitions': {'web': 'exp of the loss'}, 'threads': 2, 'request': 'a prompt',
    'repeats': 3, 'seconds': 1.0, 'command': 'adapt-jax <x>', 'versions': {},
  }  # fmt: skip


def test_the_advice_names_what_to_take_from_which_size_and_up_to_which_speed():
  """Sizes are rounded up and speeds down: the file fits, and is as fast."""
  report = make_report()
  assert report['advice'] == [
    'What to take for a limit of size: from 89.9 MB: 80 % in Q4_K_M; from 105 MB: dense in Q4_K_M; '
    'from 271 MB: dense in BF16.',
    'What to take for a speed of decoding: up to 10 tokens/s: dense in BF16; up to 21.3 tokens/s: dense in '
    'Q4_K_M; up to 25.5 tokens/s: 80 % in Q4_K_M.',
  ]
  both = ['MB', 'speed']
  assert [row['best_for'] for row in report['rows']] == [both, both, [], both]


def test_tables_and_page_show_all_files_and_mark_the_frontier(tmp_path):
  report = make_report()
  frontier_page.write(tmp_path, report, running=False)
  page = (tmp_path / 'report.html').read_text()
  assert page.count('<svg') == 2 and page.count('Q8_0') == 3  # both charts and the table
  assert all(sentence in page for sentence in report['advice'])
  rows = list(csv.DictReader((tmp_path / 'frontier.csv').open()))
  assert [row['best_for_size'] for row in rows] == ['True', 'True', 'False', 'True']
  assert rows[1]['decode_tokens_per_second_median'] == '21.39' and rows[1]['kl_web'] == '0.05'
  assert len(rows) == len(values(report).rows) == len(table(report).rows)
  assert max(map(len, table(report, ranges=False).markdown().splitlines())) <= 80


def test_before_speeds_are_measured_only_sizes_are_compared(tmp_path):
  report = make_report()
  for row in report['rows']:
    del row['prefill'], row['decode']
  report['advice'] = mark(report['rows'])
  assert len(report['advice']) == 1 and '| – | – |' in text(report)
  frontier_page.write(tmp_path, report, running=True)
  assert (tmp_path / 'report.html').read_text().count('<svg') == 1
