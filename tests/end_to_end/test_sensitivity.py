"""Mode sensitivity: the figures are those of really compacted models, one compile each, resume, bad input."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
import time
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.values import TEXT
from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.llama import init_params
from adapt_jax.modes import sensitivity
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan, keep_best
from adapt_jax.pruning.pruner import Pruner
from tests.support import runs
from tests.support.starter import Starter

BASES, BLOCKS, LAYERS = (0.0, 0.4), ('both', 'attention', 'mlp'), 4


def make_config(files):
  config = runs.make_config(files)
  config.sensitivity.bases, config.sensitivity.blocks = BASES, BLOCKS
  return config


def start(config, path):
  options = from_dict(config.to_dict())
  # What other modes refuse, or heed.
  prune = dataclasses.replace(options.prune, target=1e9)
  train = dataclasses.replace(options.train, tokens=1, source=(str(path / 'absent.txt'),))
  options = dataclasses.replace(options, prune=prune, train=train)
  workdir = Workdir(str(path), {'mode': 'sensitivity', 'config': dataclasses.asdict(options)})
  workdir.check()
  sensitivity.run(options, workdir, 'python main.py <x>')
  return json.loads(workdir.report.read_text())


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  path = tmp_path_factory.mktemp('finished') / 'out'
  return path, start(make_config(files), path)


def test_values_are_those_of_the_compacted_model(finished, files):
  """Plans are made here from scores of the model that is really compacted, not of the zeroed one."""
  _, report = finished
  inputs = prepare(from_dict(make_config(files).to_dict()))
  options, config = from_dict(make_config(files).to_dict()), inputs.config
  common = {'compiler': Compiler(), 'dtype': inputs.dtype}
  evaluator = Evaluator(inputs.evaluate[TEXT], 4, **common)
  pruner = Pruner(config, options.prune, inputs.calibration, seed=0, **common)
  params, dense = inputs.source.load_params(jnp.float32), PrunePlan.dense(config)

  def scores(plan):
    return pruner.score(surgery.stack(surgery.compact(params, plan), plan, jnp.float32), 0)

  def perplexity(plan):
    return evaluator.perplexity(plan.pruned_config(config), surgery.compact(params, plan), '')

  def narrowed(plan, kv, ffn):
    found = scores(plan)
    return keep_best(plan, found.kv, found.ffn, np.full(LAYERS, kv), np.full(LAYERS, ffn))

  # 3 KV groups and 48 channels: 0.4 takes floor(1.2) of 3 groups, 0.5 floor(1.5) of 3 and 1 of 2.
  cases = zip(report['bases'], (dense, narrowed(dense, 2, 28)), ((2, 24), (1, 14)), strict=True)
  for row, base, widths in cases:
    cut = narrowed(base, *widths)
    assert row['perplexity'] == pytest.approx(perplexity(base), rel=1e-5)
    assert row['params'] == count_params(base.pruned_config(config))
    np.testing.assert_allclose(row['layer_importance'], scores(base).distance, rtol=1e-4, atol=1e-6)
    for layer in range(LAYERS):
      for block in BLOCKS:
        kv, ffn = list(base.kv), list(base.ffn)
        kv[layer] = cut.kv[layer] if block != 'mlp' else kv[layer]
        ffn[layer] = cut.ffn[layer] if block != 'attention' else ffn[layer]
        alone = perplexity(PrunePlan(tuple(kv), tuple(ffn)))
        assert row['layers'][layer][block] == pytest.approx(alone, rel=1e-5), (layer, block)


def test_one_compile_each_whatever_the_layers_bases_and_blocks(finished):
  assert finished[1]['compiles'] == {'scoring': 1, 'evaluation': 1}


def test_windows_that_fill_no_whole_batch(finished, files, tmp_path):
  config = make_config(files)
  config.evaluate.batch, config.sensitivity.bases = 5, (0.4,)
  report = start(config, tmp_path / 'out')
  assert prepare(from_dict(config.to_dict())).evaluate[TEXT].tokens.shape[0] % 5
  for layer, found in zip(report['bases'][0]['layers'], finished[1]['bases'][1]['layers'], strict=True):
    assert layer == pytest.approx(found, rel=1e-5)


def test_layers_of_different_widths():
  """A model that was pruned before: stacked at its widest layer's width, measured layer by layer."""
  shapes = (LayerShape(4, 2, 24), LayerShape(6, 3, 40), LayerShape(2, 1, 32))
  config = ModelConfig('llama', 50, 16, 8, shapes, RopeConfig(1e4), 1e-5, False)
  params = jax.tree.map(lambda x: 5 * x, init_params(config, jax.random.key(0)))
  tokens = np.random.default_rng(0).integers(0, 50, (6, 12)).astype(np.int32)
  targets = np.ones_like(tokens, bool)
  targets[:, 0] = targets[2] = False
  blocks, common = Blocks(tokens, targets, 0), {'compiler': Compiler(), 'dtype': jnp.float32}
  dense = PrunePlan.dense(config)
  evaluator = sensitivity.LayerEvaluator(config, blocks, 4, **common)
  evaluator.start(surgery.stack(params, dense, jnp.float32), 1)
  rng = np.random.default_rng(1)
  cut = sensitivity.narrow(config, dense, 0.5, 1, rng.random((3, 3)), rng.random((3, 40)))
  alone = PrunePlan((dense.kv[0], cut.kv[1], dense.kv[2]), (dense.ffn[0], cut.ffn[1], dense.ffn[2]))
  expected = Evaluator(blocks, 4, **common).perplexity(
    alone.pruned_config(config), surgery.compact(params, alone), ''
  )
  assert evaluator.perplexity(sensitivity.cut_masks(cut, 1, 'both')) == pytest.approx(expected, rel=1e-5)


def test_report_table_csv_and_page(finished, capsys):
  path, report = finished
  assert [b['sparsity'] for b in report['bases']] == list(BASES)
  assert {'command', 'versions', 'seconds', 'perplexity', 'model'} <= set(report)
  rows = list(csv.DictReader((path / 'sensitivity.csv').open()))
  assert len(rows) == len(BASES) * LAYERS * len(BLOCKS)
  for row in rows:
    base = report['bases'][BASES.index(float(row['base']))]
    assert float(row['perplexity']) == base['layers'][int(row['layer'])][row['block']]
    removed = int(row['kv_groups_before']) - int(row['kv_groups_after'])
    assert (removed == 0) == (row['block'] == 'mlp')
    assert (row['ffn_before'] == row['ffn_after']) == (row['block'] == 'attention')
  table = (path / 'sensitivity.md').read_text()
  for layer in range(LAYERS):
    values = [f'{base["layers"][layer][block]:.2f}' for base in report['bases'] for block in BLOCKS]
    assert f'| {layer} | {" | ".join(values)} |' in table
  assert '3 → 2' in table and '2 → 1' in table and 'python main.py <x>' in table
  page = (path / 'report.html').read_text()
  assert page.count('<svg') == len(BLOCKS) + 1 and 'python main.py &lt;x&gt;' in page
  assert 'http-equiv="refresh"' not in page
  assert '1 - cos(input, output)' in page
  chart = next(svg for svg in re.findall(r'<svg.*?</svg>', page, re.DOTALL) if 'MLP pruned' in svg)
  assert chart.count('<path') == 2 * len(BASES)  # each base, and a dashed line for itself
  assert chart.count('<circle') == len(BASES) * LAYERS
  for name in ('perplexity.svg', 'perplexity-attention.svg', 'perplexity-mlp.svg', 'importance.svg'):
    picture = ElementTree.fromstring((path / name).read_text())
    circles = list(picture.iter('{http://www.w3.org/2000/svg}circle'))
    assert len(circles) == len(BASES) * LAYERS


def test_killed_run_goes_on_where_it_stopped(finished, files, tmp_path):
  path = tmp_path / 'out'
  flags = [
    '--mode=sensitivity',
    '--config.sensitivity.bases=0,0.4',
    '--config.sensitivity.blocks=both,attention,mlp',
  ]
  starter, metrics = Starter(tmp_path, files), path / 'metrics.jsonl'
  pid, deadline = starter.start(path, *flags), time.monotonic() + 300
  while not metrics.exists() or metrics.read_text().count('"layer"') < 2:
    assert os.path.exists(f'/proc/{pid}') and time.monotonic() < deadline
    time.sleep(0.002)
  os.kill(pid, signal.SIGKILL)
  assert starter.wait()[0] == -signal.SIGKILL
  before = metrics.read_text()
  assert not (path / 'report.json').exists() and before.count('\n') < 1 + 2 * LAYERS
  with open(metrics, 'a') as file:
    file.write('{"event": "lay')
  result = runs.main(files, path, *flags)
  assert result.returncode == 0 and 'resuming' in result.stdout, result.stderr
  assert metrics.read_text().startswith(before)
  assert json.loads((path / 'report.json').read_text())['bases'] == finished[1]['bases']
  assert (path / 'sensitivity.csv').read_text() == (finished[0] / 'sensitivity.csv').read_text()
  assert '| layer |' in result.stdout and 'sensitivity: 24/' not in result.stdout


def test_pruning_what_matters_most_costs_most(files, tmp_path):
  """Scores are used with the right sign: by Taylor score a layer's half costs less than a random half."""
  config = make_config(files)
  config.sensitivity.bases, config.sensitivity.blocks = (0.0,), ('mlp',)
  cost = {}
  for importance in ('taylor', 'random'):
    config.prune.importance = importance
    base = start(config, tmp_path / importance)['bases'][0]
    cost[importance] = sum(abs(math.log(x['mlp'] / base['perplexity'])) for x in base['layers'])
  assert cost['taylor'] < cost['random']


BAD = [
  ('sensitivity.sparsity', 0.0),
  ('sensitivity.sparsity', 1.0),
  ('sensitivity.sparsity', float('nan')),
  ('sensitivity.bases', ()),
  ('sensitivity.bases', (0.0, 1.0)),
  ('sensitivity.bases', (-0.1,)),
  ('sensitivity.bases', (0.2, 0.2)),
  ('sensitivity.bases', ('dense',)),
  ('sensitivity.blocks', ('both', 'heads')),
  ('sensitivity.blocks', ()),
]


@pytest.mark.parametrize('field,value', BAD, ids=lambda x: str(x))
def test_bad_values(files, field, value):
  config = make_config(files)
  config.update_from_flattened_dict({field: value})
  with pytest.raises(InputError) as error:
    from_dict(config.to_dict())
  assert f'{field} = {value!r}' in str(error.value) and '\n' not in str(error.value)


def test_biases_that_a_run_would_add_are_left_out(files, tmp_path):
  config = make_config(files)
  config.prune.compensate, config.sensitivity.bases, config.sensitivity.blocks = 'bias', (0.0,), ('both',)
  report = start(config, tmp_path / 'out')
  assert report['model']['params_before'] == count_params(open_source(str(files / 'model')).config)


def test_refusals_come_before_the_work(files, tmp_path):
  config = make_config(files)
  config.evaluate.source = ()
  with pytest.raises(InputError, match=r'evaluate\.source is empty'):
    start(config, tmp_path / 'out')
  config = make_config(files)
  config.evaluate.source = (f'a={files / "valid.txt"}', f'b={files / "train.txt"}')
  with pytest.raises(InputError, match=r'evaluate\.source names the texts a, b'):
    start(config, tmp_path / 'out')
  config = make_config(files)
  config.sensitivity.sparsity, config.sensitivity.bases = 0.25, (0.2,)
  with pytest.raises(InputError, match=r'sensitivity\.sparsity = 0\.25 .* attention\) at base 0\.2'):
    start(config, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
