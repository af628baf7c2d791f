"""The tables of mode compare, on figures made up for the test."""

from adapt_jax.modes import compare_page, compare_tables


def make_report(values, texts):
  """A finished cell for each of `values`; the first of `texts` is also the figure of the cell itself."""
  cells = []
  for number, value in enumerate(values):
    on = {name: {'dense': 10.0 + i, 'pruned': 20.0 + i + number} for i, name in enumerate(texts)}
    first = on[texts[0]]
    cells.append(
      {
        'name': f'cell {number}', 'state': 'finished', 'values': value, 'params': 10**6, 'seconds': 1.0,
        'perplexity_dense': first['dense'], 'perplexity_pruned': first['pruned'],
        'perplexity_recovered': None, 'texts': on,
      }
    )  # fmt: skip
  fields = list(values[0])
  report = {
    'model': {'source': 'a', 'params_before': 2 * 10**6}, 'fields': fields, 'x': fields[0], 'over': 'seed',
    'recover': False, 'cells': cells, 'perplexity': {'definitions': []}, 'seconds': 2.0, 'compiles': {},
    'scoring_passes': {'computed': 1, 'remembered': 0}, 'command': 'c', 'versions': {},
  }  # fmt: skip
  return compare_tables.with_groups(report)


VALUES = [
  {'prune.target': target, 'prune.calibration.samples': samples}
  for target in (110602944.0, 0.5)
  for samples in (24, 128)
]


def test_figures_say_which_of_several_texts_they_belong_to():
  report = make_report(VALUES, ['wiki', 'web'])
  shown = compare_tables.table(report)
  assert '| perplexity pruned wiki | excess wiki | KL wiki | excess web |' in shown
  assert '| perplexity wiki by samples |' in shown
  assert 'perplexity wiki 10.00, web 11.00.' in shown
  plots = compare_page.plots(report)
  assert 'Perplexity pruned: wiki<' in plots['perplexity.svg']
  assert 'Perplexity pruned: web<' in plots['perplexity-web.svg']


def test_one_text_needs_no_name():
  shown = compare_tables.table(make_report(VALUES, ['perplexity']))
  assert '| perplexity pruned | excess |' in shown and 'and perplexity 10.00.' in shown


def test_values_are_readable_and_named():
  shown = compare_tables.table(make_report(VALUES, ['perplexity']))
  assert '| target 0.5 | target 110,602,944 |' in shown and '110602944.0' not in shown
  assert '\n| samples 24 |' in shown  # a number alone says nothing


def test_csv_has_the_values_themselves():
  assert 'cell 0,finished,110602944.0,24,' in compare_tables.csv_text(make_report(VALUES, ['perplexity']))
