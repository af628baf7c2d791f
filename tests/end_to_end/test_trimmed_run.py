"""Runs with prune.vocab: budgets, figures of both vocabularies, resume, export of a checkpoint, refusals."""

import json
import math
import shutil

import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.data.windows import load_blocks
from adapt_jax.evaluation.perplexity import tokens_per_byte
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import compare
from adapt_jax.modes import export as export_mode
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.workdir import Workdir
from tests.support import runs
from tests.support.helpers import refused


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  path = runs.make_files(tmp_path_factory.mktemp('files'))
  (path / 'vocab.txt').write_text((path / 'train.txt').read_text()[:2000])
  (path / 'valid.txt').write_text((path / 'valid.txt').read_text() + 'The quick brown fox. ' * 20)
  return path


def make_config(files, **fields):
  config = runs.make_config(files)
  config.prune.vocab = (str(files / 'vocab.txt'),)
  config.prune.method, config.prune.importance, config.prune.compensate = 'uniform', 'l2', 'none'
  config.prune.steps, config.prune.stages = 10, 1
  config.train.tokens, config.train.distill.alpha, config.data.cache = 4 * 4 * 32, 1.0, str(files / 'cache')
  config.update_from_flattened_dict(fields)
  return config


def run(files, path, mode='accel', **fields):
  return runs.in_process(make_config(files, **fields), path, mode)


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  path = tmp_path_factory.mktemp('finished') / 'out'
  run(files, path)
  return path


def test_the_removed_rows_count_as_removed(files, finished):
  report, whole = json.loads((finished / 'report.json').read_text()), open_source(str(files / 'model')).config
  result, model = open_source(str(finished / 'hf')).config, report['model']
  assert model['vocab_size'] == whole.vocab_size and model['vocab_trimmed'] == result.vocab_size
  rows = whole.vocab_size - result.vocab_size
  assert rows > 10
  assert model['params_before'] == count_params(whole)
  assert model['params_trimmed'] == count_params(whole) - rows * whole.hidden_size
  assert model['params_target'] == int(0.8 * count_params(whole))
  assert 0.97 * model['params_target'] < count_params(result) <= model['params_target']
  assert 'trimmed' in (finished / 'hf/README.md').read_text()
  assert 'trimmed' in (finished / 'report.html').read_text()


def test_both_vocabularies_are_measured(files, finished):
  report = json.loads((finished / 'report.json').read_text())
  dense, trimmed = (report['perplexity'][of] for of in ('dense', 'trimmed'))
  valid = files / 'valid.txt'
  model = aj.load(files / 'model')
  assert dense == pytest.approx(aj.perplexity(model, valid, length=32), rel=1e-6)
  model = aj.trim_vocabulary(model, files / 'vocab.txt')
  assert trimmed == pytest.approx(aj.perplexity(model, valid, length=32), rel=1e-6) != dense
  # The held-out text has words that the trimmed vocabulary lacks.
  rates = report['texts']['text']['tokens_per_byte']
  assert rates['trimmed'] > rates['dense']
  tokenizer = open_source(str(files / 'model')).load_tokenizer()
  fields = {'text_field': 'text', 'messages_field': 'messages', 'field': 'text'}
  blocks = load_blocks((str(valid),), tokenizer, 32, **fields)
  size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in blocks.tokens)
  assert rates['dense'] == tokens_per_byte(blocks, tokenizer) == blocks.targets.sum() / size
  assert report['texts']['text']['kl'] > 0 and math.isfinite(report['perplexity']['recovered'])


def test_a_target_that_trimming_reaches_prunes_nothing_more(files, tmp_path):
  whole = count_params(open_source(str(files / 'model')).config)
  report = run(files, tmp_path / 'out', 'prune', **{'prune.target': 1.0, 'train.tokens': 0})
  assert report['model']['params_after'] == report['model']['params_trimmed'] < whole
  assert report['model']['params_target'] == report['budget']['asked'] == whole
  assert report['perplexity']['pruned'] == pytest.approx(report['perplexity']['trimmed'], rel=1e-5)


def test_the_card_of_a_result_that_is_pruned_again_tells_of_the_first_vocabulary(files, finished, tmp_path):
  fields = {'model.source': str(finished), 'prune.vocab': (), 'prune.target': 0.9, 'train.tokens': 0}
  report = run(files, tmp_path / 'again', 'prune', **fields)
  whole, config = open_source(str(files / 'model')).config, open_source(str(tmp_path / 'again/hf')).config
  assert report['model']['base']['vocab_size'] == whole.vocab_size

  def check(path, vocab_size):
    card = (path / 'README.md').read_text()
    assert ', pruned to' in card
    assert f'The vocabulary was trimmed to {vocab_size:,} of {whole.vocab_size:,} tokens' in card

  check(tmp_path / 'again/hf', config.vocab_size)
  small = aj.load(tmp_path / 'again/hf')
  aj.save(small, tmp_path / 'same')
  check(tmp_path / 'same/hf', config.vocab_size)
  smaller = aj.trim_vocabulary(small, np.array([[5, 6, 7, 8]]))
  assert smaller.config.vocab_size < config.vocab_size
  aj.save(smaller, tmp_path / 'smaller')
  check(tmp_path / 'smaller/hf', smaller.config.vocab_size)


def resumed(finished, path):
  """A copy of the run without its end, as a kill before the export leaves it."""
  shutil.copytree(finished, path)
  shutil.rmtree(path / 'hf')
  (path / 'report.json').unlink()
  return path


def test_a_run_resumes_to_the_same_bits(files, finished, tmp_path):
  path = resumed(finished, tmp_path / 'out')
  run(files, path)
  runs.assert_same_end(path, finished)


def test_a_checkpoint_is_exported_with_its_vocabulary(files, finished, tmp_path):
  path = resumed(finished, tmp_path / 'unfinished')
  config = runs.make_config(files)
  config.model.source = str(path)
  export_mode.run(from_dict(config.to_dict()), Workdir(str(tmp_path / 'out'), {}), 'python main.py')
  for name in ('model.safetensors', 'tokenizer.json', 'config.json'):
    assert (tmp_path / 'out/hf' / name).read_bytes() == (finished / 'hf' / name).read_bytes(), name


def test_a_changed_text_is_noticed(files, finished, tmp_path):
  path, text = resumed(finished, tmp_path / 'out'), files / 'vocab.txt'
  before = text.read_text()
  text.write_text(before + ' zebra zebra brown fox quick fox jumps lazy dog')
  try:
    assert 'prune.vocab is not what the run' in refused(run, files, path)
    config = runs.make_config(files)
    config.model.source = str(path)
    export = Workdir(str(tmp_path / 'export'), {})
    assert 'prune.vocab is not the text' in refused(export_mode.run, from_dict(config.to_dict()), export, '')
  finally:
    text.write_text(before)


def test_an_empty_text_trims_nothing(files, tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  options = {'prune.vocab': (str(tmp_path / 'empty.txt'),)}
  assert 'prune.vocab: the text is empty' in refused(run, files, tmp_path / 'out', **options)
  assert not (tmp_path / 'out').exists()


def test_cells_share_the_vocabulary(files, tmp_path):
  config = make_config(files, **{'train.tokens': 0})
  config.compare.grid = ({'prune.target': (0.9, 0.8)},)
  options = from_dict(config.to_dict())
  workdir = Workdir(str(tmp_path / 'out'), MODES['compare'].identity(options))
  compare.run(options, workdir, 'python main.py')
  report, whole = (
    json.loads(workdir.report.read_text()),
    count_params(open_source(str(files / 'model')).config),
  )
  first = json.loads((workdir.path / 'cells' / report['cells'][0]['name'] / 'report.json').read_text())
  for cell, target in zip(report['cells'], (0.9, 0.8), strict=True):
    assert cell['state'] == 'finished' and 0.96 * target < cell['params'] / whole <= target
    assert cell['perplexity_dense'] == first['perplexity']['trimmed'] != first['perplexity']['dense']
  dense = f'{whole:,} parameters, and with the trimmed vocabulary perplexity {cell["perplexity_dense"]:.2f}'
  assert f'The dense model has {dense}' in (workdir.path / 'compare.md').read_text()
  config.compare.grid = ({'prune.vocab': ((), ('x.txt',)), 'prune.target': (0.9, 0.8)},)
  assert "varies 'prune.vocab', which all cells of a grid share" in refused(
    compare.list_cells, from_dict(config.to_dict()), workdir
  )
  config.compare.grid = ({'data.text_field': ('text', 'body'), 'prune.target': (0.9, 0.8)},)
  assert "varies 'data.text_field', on which prune.vocab depends" in refused(
    compare.list_cells, from_dict(config.to_dict()), workdir
  )


def test_what_cannot_be_is_refused(files, tmp_path):
  np.save(tmp_path / 'rows.npy', np.zeros((40, 16), np.int32))
  rows = (str(tmp_path / 'rows.npy'),)

  def message(**fields):
    return refused(prepare, from_dict(make_config(files, **fields).to_dict()))

  assert 'prune.vocab renumbers: give the text' in message(**{'prune.calibration.source': rows})
  assert "prune.vocab 'nowhere.txt': no such file" in message(**{'prune.vocab': ('nowhere.txt',)})
  slicing = {'prune.method': 'slicegpt', 'train.tokens': 0}
  assert "is not for prune.method = 'slicegpt': set it to ()" in message(**slicing)
  assert 'always keeps' in message(**{'prune.target': 0.1})
  assert 'must be below the' in message(**{'train.distill.cache': 310})
