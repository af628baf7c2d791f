"""Runs that remove query heads (prune.attention): figures, exports, resume, another pruning, one KV head."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import llama
from adapt_jax.modes import export
from adapt_jax.modes.estimate_programs import Footprint, stage_configs
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.pruner import Pruner
from tests.support import runs
from tests.support.helpers import refused
from tests.support.tokenizers_for_tests import tiny_tokenizer


@pytest.fixture(scope='module')
def files(files):
  """The files of all runs, and single/: a model whose layers have one KV head."""
  path = files
  tokenizer, shapes = tiny_tokenizer(), (LayerShape(4, 1, 48),) * 4
  config = ModelConfig('llama', len(tokenizer), runs.HIDDEN, 8, shapes, RopeConfig(1e4), 1e-5, True)
  params = jax.jit(lambda: jax.tree.map(lambda x: 3 * x, llama.init_params(config, jax.random.key(1))))()
  write_hf(config, params, path / 'single', tokenizer=tokenizer)
  return path


def make_config(files, **fields):
  config = runs.make_config(files)
  config.prune.attention, config.prune.method = 'query_heads', 'adapt'
  config.prune.steps, config.prune.compensate, config.train.tokens = 10, 'least_squares', 4 * 4 * 32
  config.export.formats = ('hf', 'hf_padded', 'gguf', 'gguf_padded')
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  path = tmp_path_factory.mktemp('finished') / 'out'
  runs.in_process(make_config(files, **{'prune.target': 0.7}), path)
  return path


def test_query_heads_go_and_kv_heads_stay(files, finished):
  report, whole = json.loads((finished / 'report.json').read_text()), open_source(str(files / 'model')).config
  result = open_source(str(finished / 'hf')).config
  assert 0.66 < count_params(result) / count_params(whole) <= 0.7
  assert all(shape.num_kv_heads == 3 for shape in result.layers)
  heads = [shape.num_heads for shape in result.layers]
  assert set(heads) == {3, 6}  # one or two for each KV head
  last = report['stages'][-1]
  assert last['num_heads'] == heads and last['num_kv_heads'] == [3] * 4
  assert report['prune']['attention'] == 'query_heads'
  card = (finished / 'hf/README.md').read_text()
  assert '| layer | query heads | MLP channels |' in card and f'| 0 | {heads[0]} of 6 |' in card
  assert 'query heads and MLP channels were removed' in card and 'KV-head groups' not in card
  page = (finished / 'report.html').read_text()
  assert 'Query heads, after stage 2' in page and 'KV heads, after' not in page
  assert 'query_heads' in json.loads((finished / 'plan.json').read_text())['layers'][0]


def test_every_export_is_the_same_model(files, finished):
  valid = files / 'valid.txt'
  expected = aj.perplexity(aj.load(finished / 'hf'), valid, length=32)
  for form in ('hf_padded', 'gguf/model-F32.gguf', 'gguf_padded/model-F32.gguf'):
    assert aj.perplexity(aj.load(finished / form), valid, length=32) == pytest.approx(expected, rel=1e-4)


def test_a_run_resumes_to_the_same_bits(files, finished, tmp_path, monkeypatch):
  config, path = make_config(files, **{'prune.target': 0.7}), tmp_path / 'out'
  with monkeypatch.context() as broken, pytest.raises(InputError, match='killed'):
    runs.steps_of(broken, 3)  # which is saved; step 4 is the last
    runs.in_process(config, path)
  taken = runs.steps_of(monkeypatch)
  runs.in_process(config, path)
  assert taken == [4]
  runs.assert_same_end(path, finished)


def test_a_kill_while_pruning_changes_nothing(files, finished, tmp_path, monkeypatch):
  score, passes = Pruner.score, iter(range(100))

  def dies(self, *args, **options):
    if next(passes) == 3:
      raise KeyboardInterrupt
    return score(self, *args, **options)

  path, config = tmp_path / 'out', make_config(files, **{'prune.target': 0.7})
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Pruner, 'score', dies)
    runs.in_process(config, path)
  assert json.loads((path / 'plan.json').read_text())['step'] == 3
  runs.in_process(config, path)
  runs.assert_same_end(path, finished)


def test_a_checkpoint_is_exported(files, finished, tmp_path):
  path = tmp_path / 'unfinished'
  shutil.copytree(finished, path)
  shutil.rmtree(path / 'hf')
  (path / 'report.json').unlink()
  config = runs.make_config(files)
  config.model.source = str(path)
  workdir = Workdir(str(tmp_path / 'out'), {})
  export.run(from_dict(config.to_dict()), workdir, 'python main.py')
  assert json.loads(workdir.report.read_text())['prune']['attention'] == 'query_heads'
  for name in ('model.safetensors', 'config.json'):
    assert (tmp_path / 'out/hf' / name).read_bytes() == (finished / 'hf' / name).read_bytes(), name


@pytest.mark.parametrize(
  'fields',
  [
    {'prune.compensate': 'bias'},
    {'prune.budget': 'flops'},
    {'prune.budget': 'memory', 'bench.prompt_length': 8, 'bench.new_tokens': 2, 'bench.batch': 1},
  ],
)
def test_with_other_options(files, tmp_path, fields):
  common = {'prune.method': 'obs', 'prune.stages': 1, 'train.tokens': 0, 'prune.target': 0.6}
  report = runs.in_process(
    make_config(files, **common, **fields, **{'export.formats': ('hf',)}), tmp_path / 'out', 'prune'
  )
  budget, last = report['budget'], report['stages'][-1]
  assert 0.5 * budget['dense'] < budget['reached'] <= 0.6 * budget['dense']
  assert last['num_kv_heads'] == [3] * 4 and sum(last['num_heads']) < 24
  measured = aj.perplexity(aj.load(tmp_path / 'out'), files / 'valid.txt', length=32)
  assert measured == pytest.approx(report['perplexity']['pruned'], rel=1e-5)


def test_the_result_is_pruned_again_by_query_heads_and_not_by_groups(files, finished):
  model = aj.load(finished)
  rows = aj.rows(model, files / 'train.txt', samples=4, length=16)
  small, plan = aj.prune(model, rows, target=0.9, attention='query_heads')
  assert 0.87 < small.num_params / model.num_params <= 0.9
  assert [len(mask) for mask in plan.kv] == [s.group_size for s in model.config.layers]
  assert np.isfinite(aj.perplexity(small, files / 'valid.txt', length=32))
  assert len({s.group_size for s in model.config.layers}) > 1
  by_default, _ = aj.prune(model, rows, target=0.9)
  assert [s.widths for s in by_default.config.layers] == [s.widths for s in small.config.layers]
  message = refused(aj.prune, model, rows, target=0.9, attention='kv_groups')
  assert "can only be pruned with attention = 'query_heads'" in message


def test_a_model_with_one_kv_head_loses_query_heads_by_default(files, tmp_path):
  fields = {'model.source': str(files / 'single'), 'prune.attention': 'auto', 'prune.method': 'obs'}
  fields |= {'prune.target': 0.7, 'prune.stages': 1, 'train.tokens': 0, 'export.formats': ('hf',)}
  report = runs.in_process(make_config(files, **fields), tmp_path / 'out', 'prune')
  assert report['prune']['attention'] == 'query_heads'
  assert sum(report['stages'][-1]['num_heads']) < 16 and report['stages'][-1]['num_kv_heads'] == [1] * 4
  model = aj.load(files / 'single')
  rows = aj.rows(model, files / 'train.txt', samples=16, length=16)
  small, _ = aj.prune(model, rows, target=0.7)
  aj.save(small, tmp_path / 'saved')
  aj.save(aj.load(tmp_path / 'saved'), tmp_path / 'again')
  for path in (tmp_path / 'out/hf', tmp_path / 'saved/hf', tmp_path / 'again/hf'):
    assert 'parameters: query heads and MLP channels were removed' in (path / 'README.md').read_text()
  assert [s.widths for s in small.config.layers] == [
    s.widths for s in open_source(str(tmp_path / 'out/hf')).config.layers
  ]
  # The KV cache cannot shrink: nothing but whole layers could go.
  cached = {**fields, 'prune.budget': 'kv_cache', 'prune.target': 0.5}
  assert 'always keeps' in refused(prepare, from_dict(make_config(files, **cached).to_dict()))


def test_mode_estimate_compiles_its_programs(files):
  fields = {'model.source': str(files / 'single'), 'prune.attention': 'auto', 'prune.method': 'obs'}
  options = from_dict(make_config(files, **fields, **{'prune.target': 0.6}).to_dict())
  config = open_source(str(files / 'single')).config
  last = stage_configs(options, config)[-1]
  assert all(s.num_kv_heads == 1 and s.num_heads < 4 for s in last.layers)
  footprint = Footprint(options, config, jnp.float32)
  assert footprint.scoring().total > 0 and footprint.compensation().total > 0
