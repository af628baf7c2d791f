"""Runs with prune.hidden: budgets, the dense model as reference and teacher, resume, exports, refusals."""

import json
import shutil

import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import compare
from adapt_jax.modes import export as export_mode
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.narrow import narrowed_config
from tests.support import runs
from tests.support.helpers import refused


def make_config(files, **fields):
  config = runs.make_config(files)
  config.prune.hidden = open_source(str(files / 'model')).config.hidden_size - 8
  config.prune.method, config.prune.importance, config.prune.compensate = 'uniform', 'l2', 'least_squares'
  config.prune.steps, config.prune.stages = 10, 1
  config.train.tokens, config.train.distill.alpha, config.data.cache = 4 * 4 * 32, 1.0, str(files / 'cache')
  config.export.formats = ('hf', 'gguf')
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  path = tmp_path_factory.mktemp('finished') / 'out'
  runs.in_process(make_config(files, **{'prune.target': 0.7}), path)
  return path


def test_the_model_is_narrow_and_as_large_as_asked(files, finished):
  report, whole = json.loads((finished / 'report.json').read_text()), open_source(str(files / 'model')).config
  result = open_source(str(finished / 'hf')).config
  assert result.hidden_size == whole.hidden_size - 8 == report['stages'][-1]['hidden_size']
  assert report['model']['hidden_size'] == whole.hidden_size
  assert report['model']['params_before'] == count_params(whole)
  assert 0.66 < count_params(result) / count_params(whole) <= 0.7
  assert count_params(result) == report['model']['params_after'] == report['stages'][-1]['params']
  assert min(shape.ffn for shape in result.layers) < whole.layers[0].ffn
  assert report['compiles']['narrowing'] == 2
  card = (finished / 'hf/README.md').read_text()
  assert f'The hidden size was reduced from {whole.hidden_size} to {result.hidden_size}' in card
  assert 'pruned to 70.0%' in card
  assert open_source(str(finished / 'gguf/model-F32.gguf')).config.hidden_size == result.hidden_size


def test_figures_are_measured_against_the_dense_model(files, finished):
  report, valid = json.loads((finished / 'report.json').read_text()), files / 'valid.txt'
  dense, recovered = (aj.perplexity(aj.load(path), valid, length=32) for path in (files / 'model', finished))
  assert report['perplexity']['dense'] == pytest.approx(dense, rel=1e-6)
  assert report['perplexity']['recovered'] == pytest.approx(recovered, rel=1e-5)
  assert report['texts']['text']['kl'] > 0


def test_narrowing_alone(files, tmp_path):
  """A target that narrowing reaches prunes nothing more; the library gives the same model."""
  whole = open_source(str(files / 'model')).config
  report = runs.in_process(
    make_config(files, **{'prune.target': 1.0, 'train.tokens': 0}), tmp_path / 'out', 'prune'
  )
  small = narrowed_config(whole, whole.hidden_size - 8)
  assert report['model']['params_after'] == count_params(small) < count_params(whole)
  assert open_source(str(tmp_path / 'out/hf')).config.layers == whole.layers
  model = aj.load(files / 'model')
  calibration = make_config(files).prune.calibration
  rows = aj.rows(model, files / 'train.txt', samples=calibration.samples, length=calibration.length)
  found = aj.narrow(model, rows, hidden_size=small.hidden_size)
  aj.save(found, tmp_path / 'saved')
  for card in (tmp_path / 'out/hf/README.md', tmp_path / 'saved/hf/README.md'):
    text = card.read_text()
    assert f'narrowed to {count_params(small) / count_params(whole):.1%}' in text
    assert f'reduced from {whole.hidden_size} to {small.hidden_size}' in text
    assert 'channels were removed' not in text
  assert aj.load(tmp_path / 'saved').origin == {'hub': False, 'hidden_size': whole.hidden_size}
  assert found.config == small and found.dense == count_params(whole)
  value = aj.perplexity(found, files / 'valid.txt', length=32)
  assert value == pytest.approx(report['perplexity']['pruned'], rel=1e-4)


def test_a_run_resumes_to_the_same_bits(files, finished, tmp_path):
  path = tmp_path / 'out'
  shutil.copytree(finished, path)
  for name in ('hf', 'gguf', 'checkpoints'):  # all but the plan, as a kill while pruning leaves it
    shutil.rmtree(path / name)
  (path / 'report.json').unlink()
  lines = (path / 'metrics.jsonl').read_text().splitlines(keepends=True)
  last = max(i for i, line in enumerate(lines) if json.loads(line)['event'] == 'prune')
  (path / 'metrics.jsonl').write_text(''.join(lines[: last + 1]))
  runs.in_process(make_config(files, **{'prune.target': 0.7}), path)
  runs.assert_same_end(path, finished)


def test_a_checkpoint_is_exported(files, finished, tmp_path):
  path = tmp_path / 'unfinished'
  shutil.copytree(finished, path)
  shutil.rmtree(path / 'hf')
  (path / 'report.json').unlink()
  config = runs.make_config(files)
  config.model.source = str(path)
  export_mode.run(from_dict(config.to_dict()), Workdir(str(tmp_path / 'out'), {}), 'python main.py')
  for name in ('model.safetensors', 'config.json'):
    assert (tmp_path / 'out/hf' / name).read_bytes() == (finished / 'hf' / name).read_bytes(), name


def test_with_a_trimmed_vocabulary(files, tmp_path):
  (files / 'vocab.txt').write_text((files / 'train.txt').read_text()[:2000])
  fields = {'prune.vocab': (str(files / 'vocab.txt'),), 'prune.target': 0.7, 'prune.budget': 'memory'}
  report = runs.in_process(make_config(files, **fields, **{'train.tokens': 0}), tmp_path / 'out', 'prune')
  whole, result = (open_source(str(path)).config for path in (files / 'model', tmp_path / 'out/hf'))
  assert result.vocab_size < whole.vocab_size and result.hidden_size == whole.hidden_size - 8
  budget = report['budget']
  assert budget['reached'] <= 0.7 * budget['dense'] < budget['trimmed'] < budget['dense']
  dense, trimmed, pruned = (report['perplexity'][of] for of in ('dense', 'trimmed', 'pruned'))
  model = aj.load(files / 'model')
  assert dense == pytest.approx(aj.perplexity(model, files / 'valid.txt', length=32), rel=1e-6)
  model = aj.trim_vocabulary(model, files / 'vocab.txt')
  assert trimmed == pytest.approx(aj.perplexity(model, files / 'valid.txt', length=32), rel=1e-6)
  assert np.isfinite(pruned)


def test_cells_of_a_grid_may_have_other_widths(files, tmp_path):
  config = make_config(files, **{'train.tokens': 0})
  widths = (0, config.prune.hidden)
  config.compare.grid = ({'prune.hidden': widths, 'prune.target': (0.7,)},)
  options = from_dict(config.to_dict())
  workdir = Workdir(str(tmp_path / 'out'), MODES['compare'].identity(options))
  compare.run(options, workdir, 'python main.py')
  found = json.loads(workdir.report.read_text())['cells']
  whole = open_source(str(files / 'model')).config
  for cell, width in zip(found, widths, strict=True):
    result = json.loads((workdir.path / 'cells' / cell['name'] / 'report.json').read_text())
    assert result['stages'][-1].get('hidden_size', whole.hidden_size) == (width or whole.hidden_size)
    assert cell['state'] == 'finished' and 0.65 < cell['params'] / count_params(whole) <= 0.7
  assert found[0]['perplexity_dense'] == found[1]['perplexity_dense']
  assert found[0]['perplexity_pruned'] != found[1]['perplexity_pruned']


def test_what_cannot_be_is_refused(files):
  def message(**fields):
    return refused(prepare, from_dict(make_config(files, **fields).to_dict()))

  width = open_source(str(files / 'model')).config.hidden_size
  too_wide = message(**{'prune.hidden': width})
  assert f'prune.hidden = {width} must be from 1 to {width - 1}, below the hidden size' in too_wide
  slicing = {'prune.method': 'slicegpt', 'train.tokens': 0, 'prune.compensate': 'none'}
  assert "is not for prune.method = 'slicegpt': set it to 0" in message(**slicing)
  latency = {'prune.budget': 'latency', 'prune.latency_table': 'h100'}
  conflict = refused(from_dict, make_config(files, **latency).to_dict())
  assert "conflicts with prune.budget = 'latency'" in conflict
  model = aj.load(files / 'model')
  rows = aj.rows(model, files / 'train.txt', samples=2, length=16)
  for bad in (24.5, '24x', True):
    assert f'hidden_size = {bad!r}' in refused(aj.narrow, model, rows, hidden_size=bad)
  assert 'batch = 0' in refused(aj.narrow, model, rows, hidden_size=24, batch=0)
  assert f'hidden_size = {width} must be from 1' in refused(aj.narrow, model, rows, hidden_size=width)
  assert 'hidden = 8 is no option of prune(): call narrow first' in refused(aj.prune, model, rows, hidden=8)


def test_a_card_names_both_reductions_in_either_order(files, tmp_path):
  (files / 'vocab.txt').write_text((files / 'train.txt').read_text()[:2000])
  model = aj.load(files / 'model')
  rows = aj.rows(model, files / 'train.txt', samples=4, length=16)
  narrow_first = aj.trim_vocabulary(aj.narrow(model, rows, hidden_size=24), files / 'vocab.txt')
  trimmed = aj.trim_vocabulary(model, files / 'vocab.txt')
  rows = aj.rows(trimmed, files / 'train.txt', samples=4, length=16)
  for found in (narrow_first, aj.narrow(trimmed, rows, hidden_size=24)):
    aj.save(found, tmp_path / 'out')
    card = (tmp_path / 'out/hf/README.md').read_text()
    assert f'narrowed to {found.num_params / model.num_params:.1%}' in card
    assert 'vocabulary was trimmed' in card and f'from {model.config.hidden_size} to 24' in card
    assert 'channels were removed' not in card
