"""Options: declared once, checked by their declarations, and what of them makes two runs the same."""

import dataclasses
import json

import pytest

from adapt_jax.config.build import choices, declarations, defaults, flatten, from_dict, get
from adapt_jax.config.options import RunOptions
from adapt_jax.configs import base
from adapt_jax.models.errors import InputError
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import slicegpt
from adapt_jax.pruning.criteria import DISTANCES, IMPORTANCES
from adapt_jax.pruning.methods import METHODS


def with_values(**fields):
  """Options that differ from the defaults in fields such as prune__target."""
  values = defaults()
  for name, value in fields.items():
    *groups, last = name.split('__')
    node = values
    for group in groups:
      node = node[group]
    node[last] = value
  return from_dict(values)


def test_the_base_recipe_is_a_view_of_the_declarations():
  assert base.get_config().to_dict() == defaults()
  assert from_dict(defaults()) == from_dict({}) == RunOptions()


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


def test_an_option_that_is_absent_has_its_default():
  options = from_dict({'prune': {'target': 0.5}})
  assert options == dataclasses.replace(
    RunOptions(), prune=dataclasses.replace(RunOptions().prune, target=0.5)
  )


READ = [
  ('accel', 'train__lr', 1e-3, True),
  ('accel', 'train__micro_batch', 1, False),
  ('accel', 'export__formats', ('gguf',), False),
  ('accel', 'export__dtype', 'float16', True),
  ('accel', 'bench__repeats', 9, False),
  ('prune', 'train__lr', 1e-3, False),
  ('prune', 'prune__calibration__samples', 9, True),
  ('evaluate', 'prune__target', 0.5, False),
  ('evaluate', 'evaluate__length', 64, True),
  ('export', 'export__formats', ('gguf',), True),
  ('export', 'prune__target', 0.5, False),
  ('sensitivity', 'prune__target', 0.5, False),
  ('sensitivity', 'prune__importance', 'l2', True),
  ('bench', 'bench__repeats', 9, True),
  ('bench', 'data__text_field', 'body', False),
  ('compare', 'train__lr', 1e-3, False),  # its cells are not trained
  ('compare', 'compare__grid', ({'seed': (0, 1)},), False),
]


@pytest.mark.parametrize('mode,field,value,counts', READ)
def test_a_runs_identity_holds_what_its_mode_reads(mode, field, value, counts):
  assert (MODES[mode].identity(with_values(**{field: value})) != MODES[mode].identity(RunOptions())) == counts


def test_training_counts_in_a_grid_that_trains():
  trained = with_values(compare__recover=True)
  other = with_values(compare__recover=True, train__lr=1e-3)
  assert MODES['compare'].identity(trained) != MODES['compare'].identity(other)


def claimed(path, options, change=lambda config: None):
  """A workdir of mode prune whose run.json `change` has edited."""
  workdir = Workdir(str(path), MODES['prune'].identity(options))
  with workdir.claimed():
    pass
  saved = json.loads(workdir.run.read_text())
  change(saved['config'])
  workdir.run.write_text(json.dumps(saved))
  return workdir


def test_a_workdir_from_before_an_option_existed_resumes_with_its_default(tmp_path):
  workdir = claimed(tmp_path / 'out', RunOptions(), lambda config: config['prune'].pop('compensate'))
  workdir.check()
  other = Workdir(str(workdir.path), MODES['prune'].identity(with_values(prune__compensate='none')))
  with pytest.raises(InputError, match="prune.compensate = 'least_squares', not 'none'"):
    other.check()


def test_the_field_that_differs_is_named_before_those_that_follow_from_it(tmp_path):
  """A grid that only pruned has no training in its run.json."""
  trained = {'train__source': ('x.txt',), 'train__tokens': 4096}
  before = Workdir(str(tmp_path / 'out'), MODES['compare'].identity(with_values(**trained)))
  with before.claimed():
    pass
  now = Workdir(str(before.path), MODES['compare'].identity(with_values(compare__recover=True, **trained)))
  with pytest.raises(InputError, match='compare.recover = False, not True'):
    now.check()


def test_a_workdir_of_a_version_with_other_options_is_refused(tmp_path):
  workdir = claimed(tmp_path / 'out', RunOptions(), lambda config: config['prune'].update(magic=1))
  with pytest.raises(InputError, match='prune.magic'):
    workdir.check()


@pytest.mark.parametrize('content', ['{', '[]', '{"mode": "prune"}', '{"mode": "prune", "config": 3}'])
def test_a_damaged_run_json_is_refused(tmp_path, content):
  workdir = claimed(tmp_path / 'out', RunOptions())
  workdir.run.write_text(content)
  with pytest.raises(InputError, match='run.json'):
    workdir.check()
