"""A run with each budget: what it asks for, what its export has, and what it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from adapt_jax import api
from adapt_jax.config.build import from_dict
from adapt_jax.models.config import LayerShape
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import accel
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import latency
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS
from tests.support import runs
from tests.support.helpers import tiny_config

REQUEST = {'batch': 2, 'prompt_length': 20, 'new_tokens': 4}


def make_config(files, budget, **fields):
  config = runs.make_config(files)
  config.prune.update({'method': 'obs', 'budget': budget, 'stages': 1, 'compensate': 'none'} | fields)
  config.evaluate.source = ()  # which a budget does not change
  config.bench.update(REQUEST)
  return config


def start(config, path):
  options = from_dict(config.to_dict())
  options = dataclasses.replace(options, train=dataclasses.replace(options.train, tokens=0))
  workdir = Workdir(str(path), MODES['prune'].identity(options))
  workdir.check()
  accel.run(options, workdir, 'python main.py')
  return json.loads(workdir.report.read_text())


def write_table(path, config, dtype='float32', channel=1e-6, unit=KV_GROUPS):
  """A table of latencies that rise by the same time with each unit of attention, and with each channel."""
  phase = {'fixed': 1e-4, 'rest': 1e-5}
  phase['attention'] = {'widths': [1, 3], 'seconds': [1e-5, 3e-5]}
  phase['mlp'] = {'widths': [12, 48], 'seconds': [12 * channel, 48 * channel]}
  found = {'model': latency.likeness(config, unit), 'request': REQUEST}
  found |= {'prefill': phase, 'decode': phase, 'unit': unit.name}
  path.write_text(json.dumps({**latency.here(dtype), 'latency': found}))
  return str(path)


def cost_of(kind, config):
  """The cost of an exported model, counted again."""
  heads, kv, ffn = (sum(getattr(s, n) for s in config.layers) for n in ('num_heads', 'num_kv_heads', 'ffn'))
  D, H, tokens = config.hidden_size, config.head_dim, REQUEST['prompt_length'] + REQUEST['new_tokens']
  products = config.vocab_size * D + D * H * (2 * heads + 2 * kv) + 3 * D * ffn
  norms = (2 * config.num_layers + 1) * D
  if kind == 'flops':
    return 2 * products + 2 * tokens * heads * H
  if kind == 'kv_cache':
    return 2 * kv * H * 4
  if kind == 'memory':
    return 4 * (products + norms) + REQUEST['batch'] * tokens * 2 * kv * H * 4
  passes = REQUEST['new_tokens']  # the prefill, and a step for each token but the first
  return 1000 * passes * (1e-4 + config.num_layers * 1e-5 + kv * 1e-5 + ffn * 1e-6)


@pytest.mark.parametrize('kind', ['flops', 'kv_cache', 'memory', 'latency'])
def test_a_run_reports_what_was_asked_and_what_its_export_has(files, tmp_path, capsys, kind):
  dense = open_source(str(files / 'model')).config
  table = {'latency_table': write_table(tmp_path / 'table.json', dense)} if kind == 'latency' else {}
  report = start(make_config(files, kind, **table), tmp_path / 'out')
  budget, exported = report['budget'], open_source(str(tmp_path / 'out/hf')).config
  assert budget['kind'] == kind and budget['dense'] == pytest.approx(cost_of(kind, dense), rel=1e-9)
  assert budget['reached'] == pytest.approx(cost_of(kind, exported), rel=1e-9)
  assert 0.7 * budget['dense'] < budget['reached'] <= budget['asked']
  assert budget['asked'] == pytest.approx(0.8 * budget['dense'], rel=1e-3)
  assert report['stages'][0]['cost'] == budget['reached'] and 'params_target' not in report['model']
  if kind == 'kv_cache':
    assert all(s.ffn == 48 for s in exported.layers)
  shown, page = capsys.readouterr().out, (tmp_path / 'out/report.html').read_text()
  assert f'{budget["unit"]} ({100 * budget["asked"] / budget["dense"]:.1f} % of dense), reached' in shown
  assert budget['unit'] in page
  assert ('measured' in budget) == (kind == 'latency')
  if kind == 'latency':
    assert all(budget['measured'][name] > 0 for name in ('dense', 'finished', 'ratio'))
    assert 'measured in turn' in shown and 'measured in turn' in page


def test_stages_end_at_their_targets_and_a_table_that_changes_is_refused(files, tmp_path):
  """The table is of another dtype than the run, which therefore does not measure."""
  dense = open_source(str(files / 'model')).config
  table = write_table(tmp_path / 'table.json', dense, dtype='bfloat16')
  config = make_config(files, 'latency', latency_table=table, stages=2, method='adapt')
  report = start(config, tmp_path / 'out')
  whole, block = report['budget']['dense'], 1000 * REQUEST['new_tokens'] * 1e-6
  for stage, share in zip(report['stages'], (0.9, 0.8), strict=True):
    assert stage['target'] == pytest.approx(share * whole, rel=1e-6)
    assert stage['target'] - block < stage['cost'] <= stage['target']
  assert 'measured' not in report['budget']
  events = [json.loads(line) for line in (tmp_path / 'out/metrics.jsonl').read_text().splitlines()]
  assert [e['cost'] for e in events if e['event'] == 'prune'][-1] == report['stages'][-1]['cost']
  with pytest.raises(InputError, match=r"prune\.budget = 'latency', not 'params'"):
    start(make_config(files, 'params', stages=2, method='adapt'), tmp_path / 'out')
  write_table(tmp_path / 'table.json', dense, dtype='bfloat16', channel=2e-6)
  with pytest.raises(InputError, match=r'prune\.latency_table is not what the run'):
    start(config, tmp_path / 'out')


def test_a_latency_is_reached_by_query_heads(files, tmp_path):
  """By what the table says where nothing else is asked for; another table is refused."""
  dense = open_source(str(files / 'model')).config
  table = write_table(tmp_path / 'table.json', dense, unit=QUERY_HEADS)
  fields = {'latency_table': table, 'target': 0.6}
  budget = start(make_config(files, 'latency', **fields), tmp_path / 'out')['budget']
  exported = open_source(str(tmp_path / 'out/hf')).config
  heads, channels = (sum(getattr(s, name) for s in exported.layers) for name in ('group_size', 'ffn'))
  passes = REQUEST['new_tokens']
  found = 1000 * passes * (1e-4 + exported.num_layers * 1e-5 + heads * 1e-5 + channels * 1e-6)
  assert budget['reached'] == pytest.approx(found, rel=1e-9) and budget['reached'] <= budget['asked']
  assert {s.num_kv_heads for s in exported.layers} == {s.num_kv_heads for s in dense.layers}
  assert heads < sum(s.group_size for s in dense.layers)
  write_table(tmp_path / 'table.json', dense)
  with pytest.raises(InputError, match="by KV heads, but query_heads .*prune.attention = 'query_heads'"):
    start(make_config(files, 'latency', attention='query_heads', **fields), tmp_path / 'other')
  model = api.load(files / 'model')
  rows = api.rows(model, files / 'train.txt', samples=8, length=16)
  with pytest.raises(InputError, match="--mode=bench and attention = 'query_heads'"):
    api.prune(model, rows, budget='latency', attention='query_heads', latency_table=table)


def test_a_table_decides_what_attention_loses_where_the_model_suits_it(tmp_path):
  """With prune.attention=auto; a table by KV heads thus stays of use for a model with one in each layer."""
  single, mixed = (tiny_config('llama', (LayerShape(3, n, 32), LayerShape(3, 1, 32))) for n in (1, 3))
  by_groups, by_heads = tmp_path / 'groups.json', tmp_path / 'heads.json'
  write_table(by_groups, single)
  write_table(by_heads, single, unit=QUERY_HEADS)

  def found(table, config):
    return budget_of(from_dict({'prune': {'budget': 'latency', 'latency_table': str(table)}}), config).removes

  assert found(by_groups, single) is KV_GROUPS and found(by_heads, single) is QUERY_HEADS
  assert found('h100', single) is QUERY_HEADS
  # Its layers differ in what a unit of either kind has.
  with pytest.raises(InputError, match='as many query heads per KV head in every layer'):
    found(by_groups, mixed)
  with pytest.raises(InputError, match='by query heads per KV head, but kv_groups are to be pruned'):
    found(by_heads, mixed)


def test_the_library_prunes_to_a_budget(files):
  model = api.load(files / 'model')
  rows = api.rows(model, files / 'train.txt', samples=8, length=16)
  small, plan = api.prune(model, rows, target=0.5, budget='kv_cache', compensate='none')
  assert plan.kv_widths.sum() == 6 and (plan.ffn_widths == 48).all()
  absolute, _ = api.prune(model, rows, target=2 * 8 * 4 * 6, budget='kv_cache', compensate='none')
  assert absolute.config == small.config and small.params['embed'].dtype == jnp.float32
  with pytest.raises(
    InputError, match=r'asks for 153 bytes of KV cache per token, but method obs always keeps 256'
  ):
    api.prune(model, rows, target=0.2, budget='kv_cache')
