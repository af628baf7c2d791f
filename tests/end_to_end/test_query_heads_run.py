"""Runs that remove query heads (prune.attention): figures, exports, resume, another pruning, one KV head."""

import jax.numpy as jnp
import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes.estimate_programs import Footprint, stage_configs
from adapt_jax.pipeline.inputs import prepare
from tests.support import runs
from tests.support.helpers import new_params, refused
from tests.support.tokenizers_for_tests import tiny_tokenizer


@pytest.fixture(scope='module')
def single(tmp_path_factory):
  """A model whose layers have one KV head."""
  path = tmp_path_factory.mktemp('single')
  tokenizer, shapes = tiny_tokenizer(), (LayerShape(4, 1, 48),) * 2
  config = ModelConfig('llama', len(tokenizer), runs.HIDDEN, 8, shapes, RopeConfig(1e4), 1e-5, True)
  write_hf(config, new_params(config, seed=1), path, tokenizer=tokenizer)
  return path


def make_config(files, **fields):
  config = runs.in_two_stages(runs.make_config(files))
  config.prune.attention, config.prune.steps, config.train.tokens = 'query_heads', 10, 4 * 4 * 32
  config.prune.target = 0.7
  config.export.formats = ('hf', 'hf_padded', 'gguf', 'gguf_padded')
  config.update_from_flattened_dict(fields)
  return config


@pytest.fixture(scope='module')
def by_heads(files, tmp_path_factory):
  """A finished run, of two stages."""
  path = tmp_path_factory.mktemp('finished') / 'out'
  runs.in_process(make_config(files), path)
  return path


def test_query_heads_go_and_kv_heads_stay_in_every_export(files, by_heads):
  report, whole = runs.read_report(by_heads), open_source(str(files / 'model')).config
  result = open_source(str(by_heads / 'hf')).config
  assert 0.66 < count_params(result) / count_params(whole) <= 0.7
  assert all(shape.num_kv_heads == 3 for shape in result.layers)
  heads = [shape.num_heads for shape in result.layers]
  assert set(heads) <= {3, 6} and 3 in heads  # one or two for each KV head
  last = report['stages'][-1]
  assert last['num_heads'] == heads and last['num_kv_heads'] == [3] * len(heads)
  assert report['prune']['attention'] == 'query_heads'
  assert 'query heads' in (by_heads / 'hf/README.md').read_text()
  assert 'Query heads, after stage 2' in (by_heads / 'report.html').read_text()
  valid = files / 'valid.txt'
  expected = aj.perplexity(aj.load(by_heads / 'hf'), valid, length=32)
  for form in ('hf_padded', 'gguf/model-F32.gguf', 'gguf_padded/model-F32.gguf'):
    assert aj.perplexity(aj.load(by_heads / form), valid, length=32) == pytest.approx(expected, rel=1e-4)


def test_the_result_is_pruned_again_by_query_heads_and_not_by_groups(files, by_heads):
  model = aj.load(by_heads)
  rows = aj.rows(model, files / 'train.txt', samples=4, length=16, own=0.0)
  small, plan = aj.prune(model, rows, target=0.9, attention='query_heads', heal=0, align_ffn=1)
  assert 0.87 < small.num_params / model.num_params <= 0.9
  assert [len(mask) for mask in plan.kv] == [s.group_size for s in model.config.layers]
  if len({s.group_size for s in model.config.layers}) > 1:
    message = refused(aj.prune, model, rows, target=0.9, attention='kv_groups')
    assert "can only be pruned with prune.attention = 'query_heads'" in message


def test_a_model_with_one_kv_head_loses_query_heads_by_default(files, single, tmp_path):
  fields = {'model.source': str(single), 'prune.attention': 'auto', 'prune.method': 'obs'}
  one = fields | {'prune.stages': 1, 'train.tokens': 0, 'export.formats': ('hf',)}
  report = runs.in_process(make_config(files, **one), tmp_path / 'out', 'prune')
  assert report['prune']['attention'] == 'query_heads'
  assert sum(report['stages'][-1]['num_heads']) < 8 and report['stages'][-1]['num_kv_heads'] == [1] * 2
  model = aj.load(single)
  rows = aj.rows(model, files / 'train.txt', samples=16, length=16, own=0.0)
  small, _ = aj.prune(model, rows, target=0.7, heal=0, align_ffn=1)
  exported = open_source(str(tmp_path / 'out/hf')).config
  assert [s.widths for s in small.config.layers] == [s.widths for s in exported.layers]
  assert np.isfinite(aj.perplexity(small, files / 'valid.txt', length=32))
  # The KV cache cannot shrink: nothing but whole layers could go.
  cached = {**one, 'prune.target': '0.5kv'}
  assert 'always keeps' in refused(prepare, from_dict(make_config(files, **cached).to_dict()))
  # Mode estimate compiles its programs.
  options = from_dict(make_config(files, **fields).to_dict())
  assert all(s.num_kv_heads == 1 and s.num_heads < 4 for s in stage_configs(options, model.config)[-1].layers)
  footprint = Footprint(options, model.config, jnp.float32)
  assert footprint.scoring().total > 0 and footprint.compensation().total > 0
