"""Mode bench: figures of both models, their ratio, and a warning where pruning does not pay."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.export.hf import write_hf
from adapt_jax.export.writer import LINEAGE
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.modes import bench, bench_widths
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import latency
from adapt_jax.pruning.attention_units import QUERY_HEADS
from adapt_jax.reports.origin import Origin
from tests.support import runs
from tests.support.helpers import random_params, tiny_config

WIDE = ModelConfig('llama', 64, 256, 32, (LayerShape(8, 8, 1024),) * 2, RopeConfig(1e4), 1e-5, True)
NARROW = WIDE.with_layers((LayerShape(2, 2, 64),) * 2)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  uneven = WIDE.with_layers((LayerShape(8, 8, 1024), LayerShape(8, 8, 512)))
  for name, config in (('wide', WIDE), ('narrow', NARROW), ('uneven', uneven)):
    write_hf(config, random_params(config), root / name)
  return root


def make_options(models, dense='wide', pruned='narrow', **fields):
  config = runs.make_config(models)
  config.model.source = str(models / pruned)
  config.bench.update(
    {'dense': dense and str(models / dense), 'prompt_length': 512, 'new_tokens': 8, 'repeats': 5} | fields
  )
  return from_dict(config.to_dict())


def run(options, path):
  bench.run(options, Workdir(str(path), MODES['bench'].identity(options)), 'the command')
  return json.loads((path / 'report.json').read_text())


def test_a_model_whose_heads_are_normed_together_is_measured_by_its_channels(tmp_path):
  config = tiny_config('olmo2', (LayerShape(4, 2, 64),) * 2)
  write_hf(config, random_params(config), tmp_path / 'olmo')
  options = make_options(tmp_path, dense='', pruned='olmo', prompt_length=16, new_tokens=2, repeats=1)
  table = run(options, tmp_path / 'out')['latency']
  assert table['decode']['attention']['widths'] == [2] and len(table['decode']['mlp']['widths']) > 1


def test_a_model_with_one_kv_head_is_measured_by_its_query_heads(tmp_path, capsys):
  """As its pruning removes them; and by KV heads if it is asked to."""
  config = WIDE.with_layers((LayerShape(8, 1, 256),) * 2)
  write_hf(config, random_params(config), tmp_path / 'single')
  options = make_options(tmp_path, dense='', pruned='single', prompt_length=16, new_tokens=2, repeats=1)
  found = run(options, tmp_path / 'out')['latency']
  assert found['prefill']['attention']['widths'] == [1, 2, 4, 6, 8]
  assert '8 query heads per KV head' in capsys.readouterr().out
  name = str(tmp_path / 'out/report.json')
  table = latency.find_table(name, config, options.bench, QUERY_HEADS)
  assert table.unit is QUERY_HEADS and table.model['num_kv_heads'] == 1
  with pytest.raises(InputError, match='has times by query heads per KV head, but kv_groups are to be'):
    latency.find_table(name, config, options.bench)
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
  table = (tmp_path / 'out/bench.md').read_text()
  assert capsys.readouterr().out.endswith(table) and '2 x 512 random ids, 8 new tokens each' in table
  assert [line.split('|')[1].strip() for line in table.splitlines()[2:7]] == [
    'prefill, tokens/s',
    'decode, tokens/s',
    'peak memory, MB',
    'weights on disk (float32, float32), MB',
    'parameters, million',
  ]


def test_a_model_that_is_no_faster_is_told(models, tmp_path):
  report = run(make_options(models, dense='narrow', pruned='wide'), tmp_path / 'out')
  assert report['ratio']['prefill']['median'] < 1
  assert report['warning'].startswith('warning: not faster here: prefill at 0.')
  assert report['warning'].endswith('% of the parameters: prune more')
  assert report['warning'] in (tmp_path / 'out/bench.md').read_text().splitlines()


def test_the_ratio_is_of_runs_side_by_side_and_decides_the_warning(models):
  sources = bench._open(make_options(models))

  def warning(dense, pruned):
    found = {}
    for name, rates in (('dense', dense), ('pruned', pruned)):
      found[name] = bench._Model(sources[name], None, {}, prefill=rates, decode=rates)
    ratio = {kind: bench._ratio(found, kind) for kind in ('prefill', 'decode')}
    assert ratio['prefill'] == ratio['decode']
    params = {'dense': {'params': 100}, 'pruned': {'params': 80}}
    return ratio['decode'], bench._warning({'ratio': ratio, 'models': params, 'backend': 'cpu'}, sources)

  # The machine is three times as busy in the second round, for both.
  assert warning([90.0, 30.0, 100.0], [99.0, 33.0, 110.0]) == (
    pytest.approx({'median': 1.1, 'min': 1.1, 'max': 1.1}),
    '',
  )
  _, text = warning([100.0], [104.0])
  each = '1.04 (1.04–1.04) times'
  assert text == f"warning: not faster here: prefill at {each} and decode at {each} the dense model's speed"
  _, text = warning([100.0, 100.0, 100.0], [90.0, 104.0, 120.0])
  assert 'prefill at 1.04 (0.90–1.20) times' in text and text.endswith('again on an idle machine')


def test_widths_that_do_not_suit_the_device_are_the_reason():
  config = tiny_config('llama', (LayerShape(6, 2, 128), LayerShape(6, 2, 192), LayerShape(6, 2, 100)))
  assert bench.unaligned(config, 'cpu') == ''
  assert bench.unaligned(config, 'gpu') == (
    'MLP widths of 1 of 3 layers, such as 100, are not multiples of 64: prune with prune.align_ffn = 64'
  )
  assert 'of 2 of 3 layers, such as 192, are not multiples of 128' in bench.unaligned(config, 'tpu')


def test_peaks_of_a_device_that_counts_are_each_models_own(models, monkeypatch):
  """The count is of the process: before and after the pruned model, before and after the dense one."""
  stats = iter([(0, 10), (300, 300), (100, 300), (1000, 1100), (0, 1100), (50, 1100)])
  keys = ('bytes_in_use', 'peak_bytes_in_use')
  monkeypatch.setattr(bench, '_memory_stats', lambda: dict(zip(keys, next(stats), strict=True)))
  monkeypatch.setattr(bench.Generator, 'generate', lambda *args: None)
  monkeypatch.setattr(bench.Generator, 'planned_bytes', lambda self: 7)
  options = make_options(models)
  found = [bench._load(bench._open(options)[name], options, []) for name in ('pruned', 'dense', 'pruned')]
  peaks = [(model.peak_bytes, model.peak_how) for model in found]
  # The last one stays below what another has reached before.
  assert peaks == [(300, bench.MEASURED), (1000, bench.MEASURED), (7, bench.PLANNED)]


def write_lineage(path, report):
  files = {file.name: file.stat().st_size for file in path.glob('*.safetensors')}
  (path / LINEAGE).write_text(json.dumps(report | {'files': files}))


def test_an_export_tells_which_model_it_came_from(models, tmp_path):
  shutil.copytree(models / 'narrow', tmp_path / 'hf')
  made_from = Origin(str(models / 'wide')).sized(WIDE)
  write_lineage(tmp_path / 'hf', made_from.report())
  # Exports do not tell a path; the report beside them does.
  (tmp_path / 'report.json').write_text(json.dumps(made_from.report()))
  options = make_options(models, dense='', pruned=tmp_path / 'hf', prompt_length=8, repeats=1)
  report = run(options, tmp_path / 'out')
  assert [m['source'] for m in report['models'].values()] == [str(models / 'wide'), str(tmp_path / 'hf')]


def test_zeros_of_a_padded_format_are_not_taken_for_parameters_that_were_kept(models, tmp_path):
  shutil.copytree(models / 'wide', tmp_path / 'hf_padded')
  report = Origin(str(models / 'wide')).sized(WIDE).report()
  report['model']['params_after'] = count_params(WIDE) - 1000
  write_lineage(tmp_path / 'hf_padded', report)
  assert {*bench._open(make_options(models, dense='', pruned=tmp_path / 'hf_padded'))} == {'dense', 'pruned'}


def test_an_export_of_which_nothing_was_pruned_is_dense(models, tmp_path):
  shutil.copytree(models / 'wide', tmp_path / 'hf')
  write_lineage(tmp_path / 'hf', Origin(str(tmp_path / 'gone.gguf')).sized(WIDE).report())
  options = make_options(models, dense='', pruned=tmp_path / 'hf', prompt_length=8, new_tokens=2, repeats=1)
  assert 'latency' in run(options, tmp_path / 'out')


@pytest.mark.parametrize(
  'fields,words',
  [
    (
      {'dense': '', 'pruned': 'uneven'},
      'bench.dense is empty, and .*, whose layers differ in width, does not record its origin: name',
    ),
    (
      {'prompt_length': 2045},
      r'bench.prompt_length = 2,045 and bench.new_tokens = 8 .*\(2,048 tokens\)',
    ),
  ],
)
def test_bad_input_is_refused_before_weights_are_read(models, tmp_path, monkeypatch, fields, words):
  monkeypatch.setattr(bench, 'load_source', None)
  with pytest.raises(InputError, match=words):
    run(make_options(models, **fields), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_dense_model_alone_gives_a_table_of_latencies(models, tmp_path, capsys):
  """It adds up to the whole model, narrower blocks take less, and prune.budget = latency reads it."""
  options = make_options(models, dense='', pruned='wide', prompt_length=256, new_tokens=16, repeats=5)
  report = run(options, tmp_path / 'out')
  assert 'latency_table=' in capsys.readouterr().out
  assert report['latency']['request'] == {'batch': 1, 'prompt_length': 256, 'new_tokens': 16}
  for kind in ('prefill', 'decode'):
    found = report['latency'][kind]
    assert found['attention']['widths'] == [1, 2, 4, 6, 8] and found['mlp']['widths'] == [
      128,
      256,
      512,
      768,
      1024,
    ]
    assert found['mlp']['seconds'][0] < found['mlp']['seconds'][-1]
  table = latency.find_table(str(tmp_path / 'out/report.json'), WIDE, options.bench)
  assert table.where == latency.here('float32')
  budget = latency.budget(table, WIDE)
  kv, ffn = np.full(2, 8), np.full(2, 1024)
  assert budget.cost(kv, ffn) == budget.dense > budget.cost(kv // 2, ffn // 2) > 0


def test_what_was_measured_is_part_of_a_workdirs_identity(models):
  identities = [
    MODES[mode].identity(make_options(models, repeats=n)) for n in (1, 2) for mode in ('bench', 'accel')
  ]
  assert identities[0] != identities[2] and identities[1] == identities[3]


def test_a_table_in_which_narrower_is_not_faster_says_so():
  def phase(*mlp):
    return {
      'attention': {'widths': [4], 'seconds': [0.0]},
      'mlp': {'widths': [128, 256, 512], 'seconds': [*mlp]},
    }

  phases = {'prefill': phase(1.0, 2.0, 4.0), 'decode': phase(1.0, 3.0, 2.5)}
  found = {'latency': {'unit': 'kv_groups', **phases}}
  assert bench_widths.warning(found).startswith(
    'warning: in the decode, 256 MLP channels took no less time than 512: measure again'
  )
  found['latency']['decode'] = phase(1.0, 2.0, 2.5)
  assert bench_widths.warning(found) == ''


def test_an_origin_that_is_not_here_is_no_id_of_the_hub(models, tmp_path):
  """A path is relative to the directory in which the model was pruned."""
  shutil.copytree(models / 'narrow', tmp_path / 'hf')
  write_lineage(tmp_path / 'hf', Origin('models/wide').sized(WIDE).report())
  with pytest.raises(
    InputError, match='bench.dense is empty, .* from .models/wide., which is not here: name'
  ):
    run(make_options(models, dense='', pruned=tmp_path / 'hf'), tmp_path / 'out')
  with pytest.raises(InputError, match="bench.dense '/nowhere': no such file or directory"):
    run(make_options(models, dense='/nowhere'), tmp_path / 'out')
