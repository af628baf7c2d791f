"""Grids: which cells, in which order, under which names."""

from types import SimpleNamespace

import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.models.errors import InputError
from adapt_jax.modes import cells, compare_grid

CALIBRATION = 'prune.calibration.source'
BASE = {
  'seed': 0,
  'prune': {'method': 'adapt', 'target': 0.8, 'calibration': {'source': ('a.txt',), 'samples': 8}},
  'train': {'source': ()},
}


def values(*parts):
  return [cell.values for cell in compare_grid.expand(parts, BASE)]


def names(*parts):
  return [cell.name for cell in compare_grid.expand(parts, BASE)]


def test_the_product_of_a_part_larger_targets_first():
  cells = values({'prune.target': (0.6, 0.9), 'prune.method': ('adapt', 'flap')})
  assert [(v['prune.method'], v['prune.target']) for v in cells] == [
    ('adapt', 0.9), ('adapt', 0.6), ('flap', 0.9), ('flap', 0.6),
  ]  # fmt: skip


def test_the_union_of_parts_has_each_cell_once_with_the_base_for_what_a_part_leaves_out():
  cells = values(
    {'prune.method': ('adapt',), 'seed': (0, 1)}, {'prune.method': ('magnitude',)}, {'seed': (0,)}
  )
  assert [(v['prune.method'], v['seed']) for v in cells] == [('adapt', 0), ('adapt', 1), ('magnitude', 0)]


@pytest.mark.parametrize(
  'field, same',
  [('prune.target', (0.0, -0.0)), ('prune.target', (1, 1.0)), (CALIBRATION, ('b.txt', ['b.txt']))],
)
def test_values_that_mean_the_same_are_one_cell(field, same):
  assert len(values({field: same})) == 1


@pytest.mark.parametrize('field', ['prune.targt', 'seed.x', 'prune.calibration'])
def test_unknown_fields(field):
  with pytest.raises(InputError, match='is no option'):
    values({field: (1,)})


def test_names_are_readable_and_stay_when_the_grid_grows():
  seeds = {'seed': (1, 2)}
  few = names({'prune.target': (0.7,)} | seeds)
  assert few == ['prune.target-0.7_seed-1', 'prune.target-0.7_seed-2']
  assert set(few) < set(names({'prune.target': (0.9, 0.7)} | seeds, {'train.source': ('c.txt',)}))
  assert names({'prune.target': (0.8,)}) == ['base']


def test_names_of_files_and_of_long_values_are_told_apart():
  sources = tuple(f'{place}/{"very" * 30}/long.txt' for place in 'abc') + ('a/b/long.txt', '../*.txt', 'ä b')
  cells = names({CALIBRATION: sources})
  assert len(set(cells)) == len(sources)
  for name in cells:
    assert len(name) <= 80 and not set(name) & set('/*? \'"') and name.isascii()


def test_cells_with_other_teachers_do_not_contradict_each_other():
  def run(teacher, digest):
    options = from_dict({'train': {'distill': {'source': teacher}}})
    workdir = SimpleNamespace(texts=lambda: {'train.distill.source': digest})
    return SimpleNamespace(options=options, workdir=workdir, cell=SimpleNamespace(label=teacher))

  def check(*todo):
    inputs = [SimpleNamespace(digests=one.workdir.texts) for one in todo]
    cells.check_same_inputs([run('a', '1')], list(todo), inputs)

  check(run('b', '2'), run('a', '1'))
  with pytest.raises(InputError, match=r'train\.distill\.source'):
    check(run('a', '2'))
