"""A run with each kind of target: what it asks for, what its export has, and what it refuses."""

import json

import pytest

from adapt_jax.config.units import amount
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.pruning import latency
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS
from tests.support import runs

REQUEST = {'batch': 2, 'prompt_length': 20, 'new_tokens': 4}


def make_config(files, target, **fields):
  config = runs.make_config(files)
  config.prune.update({'method': 'obs', 'target': target, 'compensate': 'none'} | fields)
  config.train.tokens, config.evaluate.source = 0, ()  # which a target does not change
  config.bench.update(REQUEST)
  return config


def write_table(path, config, dtype='float32', channel=1e-6, unit=KV_GROUPS):
  """A table of latencies that rise by the same time with each unit of attention, and with each channel."""
  phase = {'fixed': 1e-4, 'rest': 1e-5}
  phase['attention'] = {'widths': [1, 3], 'seconds': [1e-5, 3e-5]}
  phase['mlp'] = {'widths': [12, 48], 'seconds': [12 * channel, 48 * channel]}
  found = {'model': latency.likeness(config, unit), 'request': REQUEST}
  found |= {'prefill': phase, 'decode': phase, 'unit': unit.name}
  path.write_text(json.dumps({**latency.here(dtype), 'latency': found}))
  return str(path)


def cost_of(kind, config, unit):
  """The cost of an exported model, counted again."""
  heads, kv, ffn = (sum(getattr(s, n) for s in config.layers) for n in ('num_heads', 'num_kv_heads', 'ffn'))
  D, H, tokens = config.hidden_size, config.head_dim, REQUEST['prompt_length'] + REQUEST['new_tokens']
  products = config.vocab_size * D + D * H * (2 * heads + 2 * kv) + 3 * D * ffn
  if kind == 'flops':
    return 2 * products + 2 * tokens * heads * H
  if kind == 'kv_cache':
    return 2 * kv * H * 4
  passes = REQUEST['new_tokens']  # the prefill, and a step for each token but the first
  units = sum(map(unit.count, config.layers))
  return 1000 * passes * (1e-4 + config.num_layers * 1e-5 + units * 1e-5 + ffn * 1e-6)


@pytest.mark.parametrize(
  'kind,unit',
  [('flops', KV_GROUPS), ('kv_cache', KV_GROUPS), ('latency', KV_GROUPS), ('latency', QUERY_HEADS)],
)
def test_a_run_reports_what_was_asked_and_what_its_export_has(files, tmp_path, capsys, kind, unit):
  """A table by query heads decides what attention loses, where nothing else is asked for."""
  dense = open_source(str(files / 'model')).config
  fields = {}
  if kind == 'latency':
    fields['latency_table'] = write_table(tmp_path / 'table.json', dense, unit=unit)
  target = '0.8kv' if kind == 'kv_cache' else f'0.8{kind}'
  report = runs.in_process(make_config(files, target, **fields), tmp_path / 'out', 'prune')
  budget, exported = report['budget'], open_source(str(tmp_path / 'out/hf')).config
  assert budget['kind'] == kind and budget['dense'] == pytest.approx(cost_of(kind, dense, unit), rel=1e-9)
  assert budget['reached'] == pytest.approx(cost_of(kind, exported, unit), rel=1e-9)
  assert 0.6 * budget['dense'] < budget['reached'] <= budget['asked']
  assert budget['asked'] == pytest.approx(0.8 * budget['dense'], rel=1e-3)
  assert report['stages'][0]['cost'] == budget['reached'] and 'params_target' not in report['model']
  if kind == 'kv_cache':
    assert all(s.ffn == 48 for s in exported.layers)
  if unit is QUERY_HEADS:
    assert {s.num_kv_heads for s in exported.layers} == {s.num_kv_heads for s in dense.layers}
  assert budget['unit'] in capsys.readouterr().out
  assert budget['unit'] in (tmp_path / 'out/report.html').read_text()
  assert ('measured' in budget) == (kind == 'latency')
  if kind == 'latency':
    assert all(budget['measured'][name] > 0 for name in ('dense', 'finished', 'ratio'))


def test_stages_end_at_their_targets_and_a_table_that_changes_is_refused(files, tmp_path):
  """The table is of another dtype than the run, which therefore does not measure."""
  dense = open_source(str(files / 'model')).config
  table = write_table(tmp_path / 'table.json', dense, dtype='bfloat16')
  config = make_config(files, '0.8latency', latency_table=table, stages=2, method='adapt')
  report = runs.in_process(config, tmp_path / 'out', 'prune')
  whole, block = report['budget']['dense'], 1000 * REQUEST['new_tokens'] * 1e-6
  for stage, share in zip(report['stages'], (0.9, 0.8), strict=True):
    assert stage['target'] == pytest.approx(share * whole, rel=1e-6)
    assert stage['target'] - block < stage['cost'] <= stage['target']
  assert 'measured' not in report['budget']
  write_table(tmp_path / 'table.json', dense, dtype='bfloat16', channel=2e-6)
  (tmp_path / 'out/report.json').unlink()
  with pytest.raises(InputError, match=r'prune\.latency_table is not what the run'):
    runs.in_process(config, tmp_path / 'out', 'prune')


def test_tokens_a_second_are_measured_beside_what_was_asked(files, tmp_path, capsys):
  """Of two rows together: a step of decoding takes as long as the table says."""
  dense = open_source(str(files / 'model')).config
  table = write_table(tmp_path / 'table.json', dense)
  step = 1e-4 + 2 * (1e-5 + 3e-5 + 48e-6)
  rate = 2 / (0.8 * step)
  report = runs.in_process(
    make_config(files, f'{rate:.2f}tok/s', latency_table=table), tmp_path / 'out', 'prune'
  )
  budget = report['budget']
  assert budget['dense'] == pytest.approx(1000 * step) and budget['asked'] == pytest.approx(
    800 * step, rel=1e-4
  )
  assert 0.7 * budget['dense'] < budget['reached'] <= budget['asked']
  found, asked = budget['measured']['tokens_per_second'], float(budget['target'].removesuffix('tok/s'))
  beside = f'measured {amount("decode", found)} tok/s ({100 * (found / asked - 1):+.1f} %)'
  assert found > 0 and beside in capsys.readouterr().out
  assert beside in (tmp_path / 'out/report.html').read_text()


@pytest.mark.parametrize('kind', ['', 'Q8_0'])
def test_a_target_in_mb_is_that_of_the_file(files, tmp_path, capsys, kind):
  """The GGUF file that it counts is written, though export.formats does not name it."""
  whole = 0.045 if kind else 0.1
  target = f'{whole:g}MB@{kind.lower()}' if kind else f'{whole:g}MB'
  report = runs.in_process(make_config(files, target), tmp_path / 'out', 'prune')
  file = tmp_path / ('out/gguf/model-Q8_0.gguf' if kind else 'out/hf/model.safetensors')
  assert report['budget']['measured'] == {'finished': file.stat().st_size / 1e6}
  assert report['budget']['reached'] <= whole < report['budget']['dense']
  size = report['budget']['measured']['finished']
  beside = f'measured {size:.4g} MB ({100 * (size / whole - 1):+.1f} %)'
  assert f'asked {target}, {beside}' in capsys.readouterr().out
