"""Modes trim and narrow: what they write, and runs that start from it with the dense model as teacher."""

import json

import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pruning.narrow import narrowed_config
from tests.support import runs
from tests.support.helpers import refused


@pytest.fixture(scope='module')
def text(files, tmp_path_factory):
  path = tmp_path_factory.mktemp('text') / 'vocab.txt'
  path.write_text((files / 'train.txt').read_text()[:2000])
  return path


def make_config(files, **fields):
  config = runs.make_config(files)
  config.prune.method, config.prune.importance, config.prune.compensate = 'uniform', 'l2', 'none'
  config.prune.steps = 10
  config.update_from_flattened_dict(fields)
  return config


def execute(mode, files, path, **fields):
  runs.in_process(make_config(files, **fields), path, mode)
  return path


@pytest.fixture(scope='module')
def trimmed(files, text, tmp_path_factory):
  fields = {'prune.calibration.source': (str(text),)}
  return execute('trim', files, tmp_path_factory.mktemp('trimmed') / 'out', **fields)


@pytest.fixture(scope='module')
def narrowed(files, tmp_path_factory):
  path = tmp_path_factory.mktemp('narrowed') / 'out'
  return execute('narrow', files, path, **{'narrow.hidden': 24, 'export.formats': ('hf', 'gguf')})


def test_trim_writes_what_the_library_gives(files, text, trimmed):
  expected = aj.trim_vocabulary(aj.load(files / 'model'), text)
  found = aj.load(trimmed)
  assert found.config == expected.config and found.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
  for name in ('embed', 'norm'):
    np.testing.assert_array_equal(found.params[name], expected.params[name])
  whole = open_source(str(files / 'model')).config
  assert found.config.vocab_size < whole.vocab_size == found.origin.vocab_size
  assert found.dense == count_params(whole)


def test_narrow_writes_what_the_library_gives(files, narrowed):
  model, calibration = aj.load(files / 'model'), make_config(files).prune.calibration
  rows = aj.rows(model, files / 'train.txt', samples=calibration.samples, length=calibration.length, own=0.0)
  expected = aj.narrow(model, rows, hidden_size=24)
  found = aj.load(narrowed)
  assert found.config == expected.config == narrowed_config(model.config, 24)
  assert found.origin.hidden_size == model.config.hidden_size and found.dense == model.num_params
  value, other = (aj.perplexity(of, files / 'valid.txt', length=32) for of in (found, expected))
  assert value == pytest.approx(other, rel=1e-4)
  assert open_source(str(narrowed / 'gguf/model-F32.gguf')).config.hidden_size == 24


def test_both_in_a_row_and_a_run_from_it(files, trimmed, narrowed, tmp_path):
  """Each card names the first model, and all that was reduced; a target is a fraction of the source."""
  small = execute('narrow', files, tmp_path / 'small', **{'model.source': str(trimmed), 'narrow.hidden': 24})
  fields = {'model.source': str(small), 'train.distill.alpha': 1.0, 'train.distill.source': str(trimmed)}
  report = runs.in_process(make_config(files, **fields), tmp_path / 'run')
  source, result = (open_source(str(path)).config for path in (small, tmp_path / 'run'))
  whole = open_source(str(files / 'model')).config
  assert report['model']['params_before'] == count_params(source)
  assert 0.75 < count_params(result) / count_params(source) <= 0.8
  digests = json.loads((tmp_path / 'run/run.json').read_text())['texts']
  assert digests['train.distill.source'] != digests['model.source']
  own = runs.in_process(make_config(files, **fields | {'train.distill.source': ''}), tmp_path / 'own')
  assert own['perplexity']['dense'] == report['perplexity']['dense']
  assert own['perplexity']['recovered'] != report['perplexity']['recovered']  # another teacher
  for path, words in ((small, 'narrowed'), (tmp_path / 'run', 'pruned and retrained')):
    card = (path / 'hf/README.md').read_text()
    assert words.split()[0] in card and f'of {count_params(whole):,} parameters' in card
    assert f'trimmed to {result.vocab_size:,} of {whole.vocab_size:,} tokens' in card
    assert f'from {whole.hidden_size} to 24' in card


def test_lineage_and_card_have_no_local_paths(files, trimmed):
  for file in ('lineage.json', 'README.md'):
    assert str(files) not in (trimmed / 'hf' / file).read_text(), file
  assert json.loads((trimmed / 'hf/lineage.json').read_text())['origin']['source'] == 'model'


def test_what_cannot_be_is_refused(files, trimmed, tmp_path):
  width = open_source(str(files / 'model')).config.hidden_size
  for wrong in (0, width):
    fields = {'narrow.hidden': wrong}
    assert f'narrow.hidden = {wrong}' in refused(execute, 'narrow', files, tmp_path / 'out', **fields)
  (tmp_path / 'empty.txt').write_text('')
  fields = {'prune.calibration.source': (str(tmp_path / 'empty.txt'),)}
  assert 'the text is empty' in refused(execute, 'trim', files, tmp_path / 'out', **fields)
  assert not (tmp_path / 'out').exists()
  fields = {'train.distill.alpha': 1.0, 'train.distill.source': str(trimmed)}
  message = refused(prepare, from_dict(make_config(files, **fields).to_dict()))
  assert 'train.distill.source' in message and 'vocabulary' in message
