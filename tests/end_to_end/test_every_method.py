"""A run with every pruning method."""

import json

import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, channel_params, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.pruning.methods import METHODS
from tests.support import runs
from tests.support.helpers import logits, new_params, random_tokens, refused
from tests.support.tokenizers_for_tests import tiny_tokenizer

TESTED_ELSEWHERE = ('adapt', 'uniform', 'shortgpt')  # the first two by tests of other things


@pytest.fixture(scope='module')
def files(files):
  """The files of runs.py with a model of eight layers, whose heads divide its hidden size."""
  path, tokenizer = files, tiny_tokenizer()
  shapes = (LayerShape(4, 2, 48),) * 8
  config = ModelConfig('llama', len(tokenizer), 32, 8, shapes, RopeConfig(1e4), 1e-5, True)
  write_hf(config, new_params(config), path / 'eight', tokenizer=tokenizer)
  return path


def make_config(files, method, **fields):
  config = runs.make_config(files)
  config.model.source, config.prune.method = str(files / 'eight'), method
  config.update_from_flattened_dict(fields)
  return config


@pytest.mark.parametrize('name', [name for name in METHODS if name not in TESTED_ELSEWHERE])
def test_every_method_lands_with_one_compile(files, tmp_path, name):
  config = make_config(files, name, **{'train.tokens': 0, 'prune.target': 0.9, 'evaluate.source': ()})
  report = runs.in_process(config, tmp_path / 'out', 'prune')
  model, row = report['model'], report['stages'][-1]
  block = channel_params(open_source(str(files / 'eight')).config)
  assert model['params_target'] - block < model['params_after'] <= model['params_target']
  log = (tmp_path / 'out/metrics.jsonl').read_text().splitlines()
  steps = [line for line in log if '"event": "prune"' in line]
  parts = 4 if name == 'obs' else 1  # by curvature, layer by layer
  assert report['compiles']['scoring'] == parts and (len(steps) == 1) == (name != 'wanda_sp')
  assert report['compiles']['compensation'] == 1
  saved = open_source(str(tmp_path / 'out/hf')).config
  assert count_params(saved) == model['params_after'] and [s.ffn for s in saved.layers] == row['ffn']


def test_shortgpt_goes_on_after_a_kill_and_leaves_a_stock_model(files, tmp_path, monkeypatch):
  """In two stages, with training. Layers of equal width: transformers computes what we do."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config, path = runs.in_two_stages(make_config(files, 'shortgpt')), tmp_path / 'out'
  with monkeypatch.context() as broken, pytest.raises(InputError, match='killed'):
    runs.steps_of(broken, 6)  # in the second stage, whose training begins after five
    runs.in_process(config, path)
  report = runs.in_process(config, path)
  plan = json.loads((path / 'plan.json').read_text())
  gone = [not layer['kv_groups'] and not layer['ffn_channels'] for layer in plan['layers']]
  for field in ('num_heads', 'num_kv_heads', 'ffn'):
    assert [w == 0 for w in report['stages'][-1][field]] == gone
  first, second = (sum(w == 0 for w in row['ffn']) for row in report['stages'])
  assert 0 < first < second  # so stage 2 started from a model that lacked layers

  assert not list((path / 'hf').glob('*.py'))
  model = transformers.AutoModelForCausalLM.from_pretrained(path / 'hf').eval()
  assert type(model) is transformers.LlamaForCausalLM
  source = open_source(str(path / 'hf'))
  assert model.config.num_hidden_layers == source.config.num_layers < 8
  tokens = random_tokens(source.config)
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(logits(source.config, source.load_params(), tokens), expected, atol=1e-4, rtol=0)


def test_slicegpt_lands_below_the_target_and_its_export_is_evaluated_but_not_pruned(files, tmp_path):
  fields = {'prune.compensate': 'none', 'prune.target': 0.9, 'train.tokens': 0, 'export.dtype': 'bfloat16'}
  fields['prune.align_ffn'] = 32  # the default; all MLPs stay whole
  report = runs.in_process(make_config(files, 'slicegpt', **fields), tmp_path / 'out', 'prune')
  row, model, saved = report['stages'][-1], report['model'], open_source(str(tmp_path / 'out/hf'))
  assert row['hidden_size'] == saved.config.hidden_size < saved.config.sliced_from == 32
  assert 0.8 * model['params_before'] < model['params_after'] <= model['params_target']
  assert count_params(saved.config) == model['params_after']
  assert report['texts']['text']['kl'] > 0 and report['compiles']['slicing'] == 2

  sliced, valid = aj.load(tmp_path / 'out/hf'), files / 'valid.txt'
  assert abs(aj.perplexity(sliced, valid, length=32) / row['perplexity_pruned'] - 1) < 1e-5
  dense = aj.perplexity(aj.load(files / 'eight'), valid, length=32)
  assert abs(dense / report['perplexity']['dense'] - 1) < 1e-6
  rows = aj.rows(sliced, files / 'train.txt', samples=4, length=16, own=0.0)
  assert 'sliced by SliceGPT' in refused(aj.prune, sliced, rows)
