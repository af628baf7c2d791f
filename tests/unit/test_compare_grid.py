"""Grids: which cells, in which order, under which names; what cannot be varied is refused in one line."""

import pytest

from adapt_jax.models.errors import InputError
from adapt_jax.modes import compare_grid

BASE = {
  'seed': 0,
  'prune': {
    'method': 'adapt',
    'target': 0.8,
    'calibration': {'source': ('a.txt',), 'weights': (), 'samples': 8},
  },
  'train': {'source': (), 'lr': 1e-3},
}


def values(*parts):
  return [cell.values for cell in compare_grid.expand(parts, BASE)]


def test_the_product_of_a_part_larger_targets_first():
  found = values({'prune.target': (0.6, 0.9), 'prune.method': ('adapt', 'flap')})
  assert [(v['prune.method'], v['prune.target']) for v in found] == [
    ('adapt', 0.9), ('adapt', 0.6), ('flap', 0.9), ('flap', 0.6),
  ]  # fmt: skip


def test_the_union_of_parts_has_each_cell_once_with_the_base_for_what_a_part_leaves_out():
  found = values(
    {'prune.method': ('adapt',), 'seed': (0, 1)}, {'prune.method': ('magnitude',)}, {'seed': (0,)}
  )
  assert [(v['prune.method'], v['seed']) for v in found] == [('adapt', 0), ('adapt', 1), ('magnitude', 0)]


@pytest.mark.parametrize(
  'field,same',
  [
    ('prune.target', (0.0, -0.0)),
    ('prune.target', (1, 1.0)),
    ('prune.calibration.source', ('b.txt', ('b.txt',), ['b.txt'])),
  ],
)
def test_values_that_mean_the_same_are_one_cell(field, same):
  assert len(values({field: same})) == 1


def test_assigning_leaves_the_base_as_it_is():
  found = compare_grid.assign(BASE, {'prune.calibration.samples': 16, 'seed': 3})
  assert found['prune']['calibration'] == {'source': ('a.txt',), 'weights': (), 'samples': 16}
  assert found['seed'] == 3
  assert BASE['prune']['calibration']['samples'] == 8 and BASE['seed'] == 0


@pytest.mark.parametrize(
  'field,words',
  [
    ('prune.targt', ("'prune.targt'", 'config.prune has no', 'method, target')),
    ('prunes.target', ('config has no', 'seed, prune')),
    ('seed.x', ('seed has no', 'none')),
    ('prune.calibration', ('a group', 'source, weights, samples')),
    ('', ('config has no',)),
  ],
)
def test_unknown_fields(field, words):
  with pytest.raises(InputError) as error:
    values({field: (1,)})
  assert all(word in str(error.value) for word in words) and '\n' not in str(error.value)


def test_names_are_readable_and_stay_when_the_grid_grows():
  def names(*targets, **more):
    part = {'prune.target': targets, 'seed': (1, 2)}
    return [cell.name for cell in compare_grid.expand((part, *more.values()), BASE)]

  assert names(0.7) == ['prune.target-0.7_seed-1', 'prune.target-0.7_seed-2']
  assert set(names(0.7)) < set(names(0.9, 0.7))
  source = {'prune.target': (0.7,), 'prune.calibration.source': ('b.txt',), 'train.source': ('c.txt',)}
  assert set(names(0.7)) < set(names(0.7, by_a_field=source))


def test_the_cell_of_the_base_has_a_name():
  (cell,) = compare_grid.expand(({'prune.target': (BASE['prune']['target'],)},), BASE)
  assert cell.name == 'base'


def test_names_of_files_and_of_long_values_are_told_apart():
  sources = tuple(f'{place}/{"very" * 30}/long.txt' for place in 'abc') + ('a/b/long.txt', '../*.txt', 'ä b')
  cells = compare_grid.expand(({'prune.calibration.source': sources},), BASE)
  assert len({cell.name for cell in cells}) == len(sources)
  for cell in cells:
    assert len(cell.name) <= 80 and not set(cell.name) & set('/*? \'"') and cell.name.isascii()


def test_lists_of_numbers_can_vary():
  cells = compare_grid.expand(({'prune.calibration.weights': ((1.0,), (1.0, 0.5))},), BASE)
  assert [cell.values['prune.calibration.weights'] for cell in cells] == [(1.0,), (1.0, 0.5)]
  assert [cell.name.partition('_')[0] for cell in cells] == [
    'prune.calibration.weights-1.0',
    'prune.calibration.weights-1.0-0.5',
  ]


def test_short_names_of_fields():
  fields = ['prune.method', 'prune.calibration.source', 'train.source', 'seed']
  assert list(compare_grid.short(fields).values()) == ['method', 'calibration.source', 'train.source', 'seed']


def test_labels():
  (cell,) = compare_grid.expand(({'prune.calibration.source': (('a.txt', 'b.txt'),), 'seed': (1,)},), BASE)
  assert cell.label == 'prune.calibration.source=a.txt,b.txt seed=1'
