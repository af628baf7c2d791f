"""Mode bench: figures of both models, their ratio, and a warning where pruning does not pay."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.units import UNITS
from adapt_jax.export.hf import write_hf
from adapt_jax.export.writer import LINEAGE
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.modes import bench, bench_widths
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import latency
from adapt_jax.pruning.attention_units import QUERY_HEADS
from adapt_jax.reports.origin import Origin
from tests.support import runs
from tests.support.helpers import random_params, refused, tiny_config

WIDE = ModelConfig('llama', 64, 256, 32, (LayerShape(8, 8, 1024),) * 2, RopeConfig(1e4), 1e-5, True)
MODELS = {
  'wide': WIDE,
  'narrow': WIDE.with_layers((LayerShape(2, 2, 64),) * 2),
  'uneven': WIDE.with_layers((LayerShape(8, 8, 1024), LayerShape(8, 8, 512))),
  'olmo': tiny_config('olmo2', (LayerShape(4, 2, 64),) * 2),  # whose heads are normed together
  'single': WIDE.with_layers((LayerShape(8, 1, 256),) * 2),  # one KV head
}


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  for name, config in MODELS.items():
    write_hf(config, random_params(config), root / name)
  return root


def make_options(models, dense='wide', pruned='narrow', **fields):
  config = runs.make_config(models)
  config.model.source = str(models / pruned)
  config.bench.update(
    {'dense': dense and str(models / dense), 'prompt_length': 256, 'new_tokens': 8, 'repeats': 3} | fields
  )
  return from_dict(config.to_dict())


def run(options, path):
  bench.run(options, Workdir(str(path), {}), 'the command')
  return runs.read_report(path)


SHORT = {'dense': '', 'prompt_length': 16, 'new_tokens': 2, 'repeats': 1}


class Untimed(bench_widths._Bench):
  """Takes every part to be as fast as it is small, so that no other load on the machine changes the table."""

  def __init__(self, source, options, prompts):
    self.config, self.whole = source.config, [dict.fromkeys(('prefill', 'decode'), 1.0)]

  def ratio(self, plan, title):
    share = count_params(plan.pruned_config(self.config)) / count_params(self.config)
    return dict.fromkeys(('prefill', 'decode'), share)


def test_only_what_pruning_removes_is_measured(models, tmp_path, monkeypatch):
  """The channels alone of a model whose heads cannot go; query heads of one with a single KV head."""
  monkeypatch.setattr(bench_widths, '_Bench', Untimed)
  table = run(make_options(models, pruned='olmo', **SHORT), tmp_path / 'olmo')['latency']
  assert table['decode']['attention']['widths'] == [2] and len(table['decode']['mlp']['widths']) > 1
  options = make_options(models, pruned='single', **SHORT)
  assert run(options, tmp_path / 'out')['latency']['prefill']['attention']['widths'] == [1, 2, 4, 6, 8]
  name = str(tmp_path / 'out/report.json')
  table = latency.find_table(name, MODELS['single'], options.bench, QUERY_HEADS)
  assert table.unit is QUERY_HEADS and table.model['num_kv_heads'] == 1
  refused(latency.find_table, name, MODELS['single'], options.bench)  # KV groups are to be removed
  groups = dataclasses.replace(options, prune=dataclasses.replace(options.prune, attention='kv_groups'))
  assert run(groups, tmp_path / 'groups')['latency']['prefill']['attention']['widths'] == [1]


def test_a_narrow_model_beside_a_wide_one(models, tmp_path, capsys):
  report = run(make_options(models, batch=2), tmp_path / 'out')
  for figures in report['models'].values():
    for kind in ('prefill', 'decode'):
      rate = figures[f'{kind}_tokens_per_second']
      assert 0 < rate['min'] <= rate['median'] <= rate['max']
    assert figures['compiles'] == {'prefill': 1, 'decode': 1}
    assert figures['peak_bytes'] > 4 * figures['params'] and figures['peak_how'] == bench.PLANNED
    assert figures['stored_as'] == 'float32' and 1 < figures['stored_bytes'] / (4 * figures['params']) < 1.1
  assert report['models']['dense']['peak_bytes'] > 2 * report['models']['pruned']['peak_bytes']
  assert capsys.readouterr().out.endswith((tmp_path / 'out/bench.md').read_text())
  assert '2,048' in refused(run, make_options(models, prompt_length=2045), tmp_path / 'longer')


def test_the_ratio_is_of_runs_side_by_side_and_decides_the_warning(models):
  sources, _ = bench._open(make_options(models))

  def warning(dense, pruned, params=80):
    measured = {}
    for name, rates in (('dense', dense), ('pruned', pruned)):
      measured[name] = bench._Model(sources[name], None, {}, prefill=rates, decode=rates)
    ratio = {kind: bench._ratio(measured, kind) for kind in ('prefill', 'decode')}
    sizes = {'dense': {'params': 100}, 'pruned': {'params': params}}
    report = {'ratio': ratio, 'models': sizes, 'backend': 'cpu'}
    return ratio['decode']['median'], bench._warning(report, sources)

  # The machine is three times as busy in the second round, for both.
  assert warning([90.0, 30.0, 100.0], [99.0, 33.0, 110.0]) == (pytest.approx(1.1), '')
  assert '1.04 (1.04–1.04)' in warning([100.0], [104.0])[1]
  assert 'idle machine' in warning([100.0] * 3, [90.0, 104.0, 120.0])[1]
  assert 'prune more' in warning([100.0], [90.0], 98)[1]


def test_widths_that_do_not_suit_the_device_are_the_reason():
  config = tiny_config('llama', (LayerShape(6, 2, 128), LayerShape(6, 2, 192), LayerShape(6, 2, 100)))
  assert bench.unaligned(config, 'cpu') == ''
  assert '1 of 3 layers, such as 100' in bench.unaligned(config, 'gpu')
  assert '2 of 3 layers, such as 192' in bench.unaligned(config, 'tpu')


def test_peaks_of_a_device_that_counts_are_each_models_own(models, monkeypatch):
  """The count is of the process: before and after the pruned model, before and after the dense one."""
  stats = iter([(0, 10), (300, 300), (100, 300), (1000, 1100), (0, 1100), (50, 1100)])
  keys = ('bytes_in_use', 'peak_bytes_in_use')
  monkeypatch.setattr(bench, '_memory_stats', lambda: dict(zip(keys, next(stats), strict=True)))
  monkeypatch.setattr(bench.Generator, 'generate', lambda *args: None)
  monkeypatch.setattr(bench.Generator, 'planned_bytes', lambda self: 7)
  options = make_options(models)
  loaded = [bench._load(bench._open(options)[0][name], options, []) for name in ('pruned', 'dense', 'pruned')]
  peaks = [(model.peak_bytes, model.peak_how) for model in loaded]
  # The last one stays below what another has reached before.
  assert peaks == [(300, bench.MEASURED), (1000, bench.MEASURED), (7, bench.PLANNED)]


def test_an_export_tells_which_model_it_came_from(models, tmp_path):

  def opened(source, model='narrow', **fields):
    path = tmp_path / model
    shutil.copytree(models / model, path, dirs_exist_ok=True)
    report = Origin(source).sized(WIDE).report()
    report['model'] |= fields
    files = {file.name: file.stat().st_size for file in path.glob('*.safetensors')}
    (path / LINEAGE).write_text(json.dumps(report | {'files': files}))
    return bench._open(make_options(models, dense='', pruned=path))[0]

  # A path is relative to the directory in which the model was pruned, and no id of the hub.
  assert 'bench.dense is empty' in refused(opened, 'models/wide')
  # Nothing was pruned.
  assert 'dense' not in opened(str(tmp_path / 'gone.gguf'), 'wide')
  # Exports do not tell a path; the report beside them does.
  (tmp_path / 'report.json').write_text(json.dumps(Origin(str(models / 'wide')).sized(WIDE).report()))
  assert opened(str(models / 'wide'))['dense'].name == str(models / 'wide')
  # Zeros of a padded format are not parameters that were kept.
  assert 'dense' in opened(str(models / 'wide'), 'wide', params_after=count_params(WIDE) - 1000)


def test_a_dense_model_alone_gives_a_table_of_latencies(models, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(bench_widths, '_SHARES', (0.5,))  # each takes seconds
  options = make_options(models, pruned='wide', **SHORT)
  report = run(options, tmp_path / 'out')
  assert 'latency_table=' in capsys.readouterr().out
  assert report['latency']['request'] == {'batch': 1, 'prompt_length': 16, 'new_tokens': 2}
  for kind in ('prefill', 'decode'):
    phase = report['latency'][kind]
    assert (phase['attention']['widths'], phase['mlp']['widths']) == ([4, 8], [512, 1024])
  table = latency.find_table(str(tmp_path / 'out/report.json'), WIDE, options.bench)
  assert table.where == latency.here('float32')


def test_the_table_adds_up_to_the_whole_model(models, tmp_path, monkeypatch):
  """Narrower blocks take less, and a prune.target in latency reads it."""
  monkeypatch.setattr(bench_widths, '_Bench', Untimed)
  options = make_options(models, pruned='wide', **SHORT)
  found = run(options, tmp_path / 'out')['latency']
  for parts in (found['prefill'], found['decode']):
    assert parts['attention']['widths'] == [1, 2, 4, 6, 8]
    assert parts['mlp']['widths'] == [128, 256, 512, 768, 1024]
  table = latency.find_table(str(tmp_path / 'out/report.json'), WIDE, options.bench)
  budget = latency.budget(table, WIDE)
  kv, ffn, seconds = np.full(2, 8), np.full(2, 1024), options.bench.new_tokens * 1.0
  assert budget.cost(kv, ffn) == budget.dense == pytest.approx(seconds * 1000 * UNITS['latency'].parts)
  halved = count_params(WIDE.with_layers((LayerShape(4, 4, 512),) * 2)) / count_params(WIDE)
  assert budget.cost(kv // 2, ffn // 2) / budget.dense == pytest.approx(halved)


@pytest.mark.parametrize('seconds,warned', [([1.0, 3.0, 2.5], True), ([1.0, 2.0, 2.5], False)])
def test_a_table_in_which_narrower_is_not_faster_says_so(seconds, warned):
  attention = {'widths': [4], 'seconds': [0.0]}
  phase = {'attention': attention, 'mlp': {'widths': [128, 256, 512], 'seconds': seconds}}
  table = {'latency': {'unit': 'kv_groups', 'prefill': phase, 'decode': phase}}
  assert bool(bench_widths.warning(table)) == warned
