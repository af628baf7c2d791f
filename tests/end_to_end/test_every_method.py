"""The whole job through main.py with every pruning method."""

import json
import signal

import jax
import numpy as np
import pytest

from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, channel_params, count_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import llama
from adapt_jax.pruning.methods import METHODS
from tests.support import runs
from tests.support.helpers import logits, random_tokens
from tests.support.starter import Starter
from tests.support.tokenizers_for_tests import tiny_tokenizer

MANY_STEPS = ('adapt', 'uniform', 'wanda_sp')


@pytest.fixture(scope='module')
def files(files):
  """The files of runs.py with a model of eight layers, whose heads divide its hidden size."""
  path, tokenizer = files, tiny_tokenizer()
  shapes = (LayerShape(4, 2, 48),) * 8
  config = ModelConfig('llama', len(tokenizer), 32, 8, shapes, RopeConfig(1e4), 1e-5, True)
  params = jax.jit(lambda: jax.tree.map(lambda x: 3 * x, llama.init_params(config, jax.random.key(0))))()
  write_hf(config, params, path / 'eight', tokenizer=tokenizer)
  return path


@pytest.mark.parametrize('name', METHODS)
def test_the_whole_job_with_every_method(files, tmp_path, name):
  flags = ['--mode=prune', f'--config.model.source={files / "eight"}', f'--config.prune.method={name}']
  flags += ['--config.prune.stages=1', '--config.prune.target=0.9', '--config.evaluate.source=']
  result = runs.main(files, tmp_path / 'out', *flags)
  assert result.returncode == 0, result.stderr
  report = json.loads((tmp_path / 'out/report.json').read_text())
  model, row = report['model'], report['stages'][-1]
  block = channel_params(open_source(str(files / 'eight')).config)
  slack = model['params_before'] // 8 if name == 'shortgpt' else block
  assert model['params_target'] - slack < model['params_after'] <= model['params_target']
  assert len(row['ffn']) == len(row['num_kv_heads']) == 8
  steps = (tmp_path / 'out/metrics.jsonl').read_text().splitlines()
  assert report['compiles']['scoring'] == 1 and (len(steps) == 1) == (name not in MANY_STEPS)
  assert report['compiles']['compensation'] == 1
  saved = open_source(str(tmp_path / 'out/hf')).config
  assert count_params(saved) == model['params_after']
  assert [s.ffn for s in saved.layers] == [f for f in row['ffn'] if f]


@pytest.fixture(scope='module')
def shortened(files, tmp_path_factory):
  """A finished run of shortgpt with recovery, two stages."""
  path = tmp_path_factory.mktemp('shortened') / 'out'
  result = runs.main(files, path, *_shortgpt(files))
  assert result.returncode == 0, result.stderr
  return path


def _shortgpt(files):
  return [f'--config.model.source={files / "eight"}', '--config.prune.method=shortgpt']


def test_shortgpt_reports_gone_layers_where_they_were(shortened):
  report = json.loads((shortened / 'report.json').read_text())
  plan = json.loads((shortened / 'plan.json').read_text())
  gone = [not layer['kv_groups'] and not layer['ffn_channels'] for layer in plan['layers']]
  for field in ('num_heads', 'num_kv_heads', 'ffn'):
    assert [w == 0 for w in report['stages'][-1][field]] == gone
  first, second = (sum(w == 0 for w in row['ffn']) for row in report['stages'])
  assert 0 < first < second  # so stage 2 started from a model that lacked layers
  assert report['compiles']['scoring'] == 1
  assert 'layer 7' in (shortened / 'report.html').read_text()


def test_shortgpt_killed_in_its_second_stage_continues_to_the_same_bits(shortened, files, tmp_path):
  path = tmp_path / 'out'
  killed = {'kill': 'SIGKILL', 'after': {'event': 'prune', 'stage': 2}}
  assert Starter(tmp_path, files).run(path, *_shortgpt(files), **killed)[0] == -signal.SIGKILL
  result = runs.main(files, path, *_shortgpt(files))
  assert result.returncode == 0 and 'resuming' in result.stdout, result.stderr
  runs.assert_same_end(path, shortened)


def test_shortgpt_leaves_a_stock_model(shortened):
  """Layers of equal width: no code of ours beside it, and transformers computes what we do."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  assert not list((shortened / 'hf').glob('*.py'))
  model = transformers.AutoModelForCausalLM.from_pretrained(shortened / 'hf').eval()
  assert type(model) is transformers.LlamaForCausalLM
  source = open_source(str(shortened / 'hf'))
  assert model.config.num_hidden_layers == source.config.num_layers < 8
  tokens = random_tokens(source.config)
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(logits(source.config, source.load_params(), tokens), expected, atol=1e-4, rtol=0)


def test_slicegpt_lands_below_the_target_and_its_export_is_evaluated_but_not_pruned(files, tmp_path):
  flags = ['--mode=prune', f'--config.model.source={files / "eight"}', '--config.prune.method=slicegpt']
  flags += ['--config.prune.compensate=none', '--config.prune.stages=1', '--config.prune.target=0.9']
  flags += ['--config.export.dtype=bfloat16']
  result = runs.main(files, tmp_path / 'out', *flags)
  assert result.returncode == 0, result.stderr
  report = json.loads((tmp_path / 'out/report.json').read_text())
  row, model, saved = report['stages'][-1], report['model'], open_source(str(tmp_path / 'out/hf'))
  assert row['hidden_size'] == saved.config.hidden_size < saved.config.sliced_from == 32
  assert count_params(saved.config) == model['params_after'] <= model['params_target']
  assert model['params_after'] > 0.8 * model['params_before']
  assert report['texts']['text']['kl'] > 0 and report['compiles']['slicing'] == 2
  assert f'residual stream: width {row["hidden_size"]}' in result.stdout

  source = f'--config.model.source={tmp_path / "out/hf"}'
  again = runs.main(files, tmp_path / 'measured', '--mode=evaluate', source)
  assert again.returncode == 0, again.stderr
  measured = json.loads((tmp_path / 'measured/report.json').read_text())['perplexity']['dense']
  assert abs(measured / row['perplexity_pruned'] - 1) < 1e-5
  dense = runs.main(files, tmp_path / 'dense', '--mode=evaluate', f'--config.model.source={files / "eight"}')
  assert dense.returncode == 0, dense.stderr
  unrounded = json.loads((tmp_path / 'dense/report.json').read_text())['perplexity']['dense']
  assert abs(unrounded / report['perplexity']['dense'] - 1) < 1e-6
  refused = runs.main(files, tmp_path / 'pruned', '--mode=prune', source)
  assert refused.returncode == 2 and 'sliced by SliceGPT' in refused.stderr
