"""Mode recover: a model that lost layers elsewhere learns from the dense one; nothing is pruned."""

import dataclasses
import json

import chex
import jax
import pytest

import adapt_jax as aj
from adapt_jax.export.hf import write_hf
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from tests.support import runs
from tests.support.helpers import new_params, refused


@pytest.fixture(scope='module')
def asked(files, tmp_path_factory):
  """The config of a run on a model of two layers, with one of four as its teacher; no calibration text."""
  path, source = tmp_path_factory.mktemp('pair'), open_source(str(files / 'model'))
  tokenizer, config = source.load_tokenizer(), runs.make_config(files)
  short = dataclasses.replace(source.config, max_position=512)  # rows of calibration are longer
  dense = dataclasses.replace(short, layers=short.layers * 2)
  params = new_params(dense)
  write_hf(dense, params, path / 'dense', tokenizer=tokenizer)
  params['layers'] = [params['layers'][0], params['layers'][3]]
  write_hf(short, params, path / 'short', tokenizer=tokenizer)
  config.model.source, config.prune.calibration.source = str(path / 'short'), ()
  config.train.distill.update({'source': str(path / 'dense'), 'alpha': 0.5})
  config.train.tokens *= 2
  return config


@pytest.fixture(scope='module')
def recovered(asked, tmp_path_factory):
  path = tmp_path_factory.mktemp('recovered') / 'out'
  return path, runs.in_process(asked, path, 'recover')


def test_the_loss_falls_and_both_models_are_reported(asked, recovered, files):
  path, report = recovered
  events = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  losses = [event['loss'] for event in events if event['event'] == 'train']
  assert len(losses) == 16 and sum(losses[-4:]) < 0.8 * sum(losses[:4])
  teacher = aj.load(asked.train.distill.source)
  expected = aj.perplexity(teacher, files / 'valid.txt', length=32)
  assert report['perplexity']['dense'] == pytest.approx(expected, rel=1e-5)
  assert report['teacher']['params_before'] == teacher.num_params > report['model']['params_before']
  assert report['model']['params_before'] == report['model']['params_after']
  card = (path / 'hf/README.md').read_text()
  assert 'Distilled from: `dense`' in card and '| teacher |' in card


def test_the_library_gives_the_same_weights(asked, recovered, files, tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  short, dense = aj.load(asked.model.source), aj.load(asked.train.distill.source)
  options = {name: asked.train[name] for name in ('tokens', 'batch', 'micro_batch', 'length', 'lr', 'min_lr')}
  found = aj.recover(short, str(files / 'train.txt'), teacher=dense, **options)
  written = open_source(str(recovered[0] / 'hf')).load_params(None)
  chex.assert_trees_all_equal(jax.device_get(found.params), jax.device_get(written))


def test_a_killed_run_is_exported_and_goes_on_with_the_same_bits(asked, recovered, tmp_path, monkeypatch):
  path = tmp_path / 'out'
  with monkeypatch.context() as patch, pytest.raises(InputError, match='killed'):
    runs.steps_of(patch, last=6)
    runs.in_process(asked, path, 'recover')
  export = asked.copy_and_resolve_references()
  export.model.source = str(path)
  exported = runs.in_process(export, tmp_path / 'export', 'export')
  assert exported['stages'][-1]['tokens'] == 5 * 4 * 32
  assert exported['teacher']['params_before'] > exported['model']['params_before']
  runs.in_process(asked, path, 'recover')
  runs.assert_same_end(path, recovered[0])


@pytest.mark.parametrize(
  ('field', 'value'), [('train.distill.source', ''), ('train.distill.alpha', 0.0), ('train.tokens', 0)]
)
def test_what_it_needs_is_named(asked, tmp_path, field, value):
  config = asked.copy_and_resolve_references()
  config.update_from_flattened_dict({field: value})
  assert field in refused(runs.in_process, config, tmp_path / 'out', 'recover')
