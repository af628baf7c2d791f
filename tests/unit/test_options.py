"""Options: declared once, checked by their declarations, and what of them makes two runs the same."""

import re

import pytest

from adapt_jax.config.build import choices, declarations, defaults, flatten, from_dict, get
from adapt_jax.config.options import RunOptions
from adapt_jax.configs import base
from adapt_jax.models.errors import InputError
from adapt_jax.modes.registry import MODES
from adapt_jax.pruning import slicegpt
from adapt_jax.pruning.criteria import DISTANCES, IMPORTANCES
from adapt_jax.pruning.methods import METHODS


def with_values(**fields):
  """Options that differ from the defaults in fields such as prune__target."""
  values = {}
  for name, value in fields.items():
    *groups, last = name.split('__')
    node = values
    for group in groups:
      node = node.setdefault(group, {})
    node[last] = value
  return from_dict(values)


def test_the_base_recipe_is_a_view_of_the_declarations():
  assert base.get_config().to_dict() == defaults()
  assert from_dict(defaults()) == from_dict({}) == RunOptions()


def test_a_recipe_may_name_one_source_as_a_string():
  config = base.get_config()
  config.train.source, config.evaluate.source = 'corpus.jsonl', ('a=b.txt', 'c=d.txt')
  config.train.remat = True
  options = from_dict(config.copy_and_resolve_references().to_dict())
  assert options.train.source == ('corpus.jsonl',) and len(options.evaluate.source) == 2
  assert options.train.remat == 'True'
  with pytest.raises(TypeError):
    config.train.tokens = 'many'


def test_every_option_says_what_it_means():
  declared = dict(declarations())
  assert declared.keys() == flatten(defaults()).keys()
  for field, declaration in declared.items():
    assert declaration.meaning.endswith('.') and len(declaration.meaning) > 8, field


def test_choices_are_what_the_program_has():
  assert choices('prune.method') == (*METHODS, slicegpt.METHOD)
  assert choices('prune.importance') == tuple(IMPORTANCES)
  assert choices('prune.layer_distance') == tuple(DISTANCES)


@pytest.mark.parametrize('field', [f for f, d in declarations() if d.within or d.choices])
def test_each_range_and_choice_is_enforced(field):
  """The values at the ends of a range pass, those beyond are refused with the field's name."""
  declared, default = dict(declarations())[field], get(RunOptions(), field)
  several = isinstance(default, tuple)
  bad = ['no such value']
  if declared.within:
    low, high = declared.within
    bad = [low - 1, high + 1]
  for value in bad:
    with pytest.raises(InputError, match=f'{field} = '):
      with_values(**{field.replace('.', '__'): (value,) if several else value})


RULES = [
  ('prune__target', 0.0),
  ('prune__target', float('nan')),
  ('prune__target', float('inf')),
  ('prune__serve', 'tensor_parallel=0'),
  ('prune__target', '0.8latency'),  # without a table
  ('prune__target', '20tok/s'),
  ('prune__target', '600XB'),
  ('prune__target', '0.8kv@q8_0'),  # no file
  ('prune__target', (0.8, '0.8')),  # twice
  ('prune__target', ()),
  ('prune__latency_table', 'h100'),  # for another target
  ('prune__calibration__weights', (1.0, 2.0)),
  ('train__weights', (1.0,)),  # of no source
  ('train__lr', -0.5),
  ('train__min_lr', -0.5),
  ('mesh__tensor', 0),
  ('mesh__data', -1),  # a second one
  ('sensitivity__bases', (0.1, 0.1)),
  ('export__push', 'a repository'),
  ('train__batch', True),
  ('train__batch', 2.5),
  ('train__lr', 'high'),
  ('evaluate__source', (3,)),
  ('evaluate__source', ('own=a.txt',)),  # the name of the dense model's text
  ('compare__grid', ({'seed': ()},)),
  ('prune__targt', 0.5),
  ('prune', 3),
  ('train__lr', None),
  ('train__weights', (10**400,)),
]


@pytest.mark.parametrize('field,value', RULES)
def test_values_that_mean_nothing_are_refused_by_name(field, value):
  with pytest.raises(InputError, match=re.escape(field.replace('__', '.').removesuffix('.data'))):
    with_values(**{field: value})


def test_weights_are_shares_of_the_entries():
  source = {'train__source': ('a', 'b')}
  with_values(train__weights=(1.0, 0.0), **source)
  for wrong in ((0.0, 0.0), (-1.0, 2.0), (float('nan'), 1.0)):
    with pytest.raises(InputError, match='train.weights'):
      with_values(train__weights=wrong, **source)


READ = [
  ('accel', 'train__lr', 1e-3, True),
  ('accel', 'train__micro_batch', 1, False),
  ('accel', 'export__formats', ('gguf',), False),
  ('accel', 'export__dtype', 'float16', True),
  ('accel', 'bench__repeats', 9, False),
  ('accel', 'mesh__data', 2, False),  # a run may go on with other devices
  ('accel', 'prune__calibration__batch', 1, False),
  ('accel', 'evaluate__batch', 1, False),
  ('accel', 'train__save_every', 1, False),
  ('accel', 'data__cache', 'elsewhere', False),
  ('prune', 'train__lr', 1e-3, False),
  ('prune', 'prune__calibration__samples', 9, True),
  ('evaluate', 'prune__target', 0.5, False),
  ('evaluate', 'evaluate__length', 64, True),
  ('export', 'export__formats', ('gguf',), True),
  ('export', 'prune__target', 0.5, False),
  ('sensitivity', 'prune__target', 0.5, False),
  ('sensitivity', 'prune__importance', 'l2', True),
  ('sensitivity', 'prune__serve', 'gguf', True),
  ('bench', 'bench__repeats', 9, True),
  ('bench', 'data__text_field', 'body', False),
  ('compare', 'train__lr', 1e-3, False),  # its cells are not trained
  ('compare', 'compare__grid', ({'seed': (0, 1)},), False),
]


@pytest.mark.parametrize('mode,field,value,counts', READ)
def test_a_runs_identity_holds_what_its_mode_reads(mode, field, value, counts):
  assert (MODES[mode].identity(with_values(**{field: value})) != MODES[mode].identity(RunOptions())) == counts


def test_training_counts_in_a_grid_that_trains():
  trained, other = (with_values(compare__recover=True, train__lr=lr) for lr in (1e-3, 2e-3))
  assert MODES['compare'].identity(trained) != MODES['compare'].identity(other)
