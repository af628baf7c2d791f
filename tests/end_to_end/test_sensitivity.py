"""Mode sensitivity: the figures are those of really compacted models, one compile each, resume, bad input."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.values import TEXT
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan, keep_best
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.reports.sensitivity_page import layers_table
from tests.support import runs

BASES, LAYERS = (0.0, 0.4), 2


def make_config(files):
  config = runs.make_config(files)
  config.sensitivity.bases = BASES
  return config


def start(config, path):
  config.prune.update({'compensate': 'bias', 'target': 1e9})  # of other modes
  config.train.update({'tokens': 1, 'source': (str(path / 'absent.txt'),)})
  return runs.in_process(config, path, 'sensitivity', command='python main.py <x>')


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  """The directory of a measurement that was killed after a layer and then went on, and its report."""
  path, perplexity, titles = tmp_path_factory.mktemp('finished') / 'out', Evaluator.perplexity, []

  def until_killed(self, config, params, title):
    titles.append(title)
    if len(titles) == 3:  # a base and a layer
      raise KeyboardInterrupt
    return perplexity(self, config, params, title)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Evaluator, 'perplexity', until_killed)
    with pytest.raises(KeyboardInterrupt):
      start(make_config(files), path)
    log = path / 'metrics.jsonl'
    before = log.read_text()
    with log.open('a') as file:
      file.write('{"event": "lay')  # the machine died here
    report = start(make_config(files), path)
  assert before.count('\n') == 2 and log.read_text().startswith(before)
  assert len(titles) == 1 + len(BASES) * (LAYERS + 1)  # each once, and the one that was killed
  return path, report


def test_values_are_those_of_the_compacted_model(finished, files):
  """Plans are made here from scores of the model that is really compacted, not of the zeroed one."""
  options = from_dict(make_config(files).to_dict())
  inputs = prepare(options)
  config, common = inputs.config, {'compiler': Compiler(), 'dtype': inputs.dtype}
  evaluator = Evaluator(inputs.evaluate[TEXT], 4, **common)
  pruner = Pruner(config, options.prune, inputs.calibration, seed=0, **common)
  params, dense = inputs.source.load_params(jnp.float32), PrunePlan.dense(config)

  def scores(plan):
    return pruner.score(surgery.stack(surgery.compact(params, plan), plan, jnp.float32), 0)

  def perplexity(plan):
    return evaluator.perplexity(plan.pruned_config(config), surgery.compact(params, plan), '')

  def narrowed(plan, kv, ffn):
    of_plan = scores(plan)
    return keep_best(plan, of_plan.kv, of_plan.ffn, np.full(LAYERS, kv), np.full(LAYERS, ffn))

  # 3 KV groups and 48 channels: 0.4 takes floor(1.2) of 3 groups, 0.5 floor(1.5) of 3 and 1 of 2.
  cases = zip(finished[1]['bases'], (dense, narrowed(dense, 2, 28)), ((2, 24), (1, 14)), strict=True)
  for row, base, widths in cases:
    cut = narrowed(base, *widths)
    assert row['perplexity'] == pytest.approx(perplexity(base), rel=1e-5)
    assert row['params'] == count_params(base.pruned_config(config))
    np.testing.assert_allclose(row['layer_importance'], scores(base).distance, rtol=1e-4, atol=1e-6)
    for layer in range(LAYERS):
      kv, ffn = list(base.kv), list(base.ffn)
      kv[layer], ffn[layer] = cut.kv[layer], cut.ffn[layer]
      alone = perplexity(PrunePlan(tuple(kv), tuple(ffn)))
      assert row['layers'][layer] == pytest.approx(alone, rel=1e-5), layer


def test_report_table_csv_and_page(finished):
  path, report = finished
  assert report['compiles'] == {'scoring': 1, 'evaluation': 2}  # whatever the layers and bases
  rows = list(csv.DictReader((path / 'sensitivity.csv').open()))
  assert len(rows) == len(layers_table(report).rows) == len(BASES) * LAYERS
  for row in rows:
    base = report['bases'][BASES.index(float(row['base']))]
    assert float(row['perplexity']) == base['layers'][int(row['layer'])]
    assert int(row['kv_groups_before']) > int(row['kv_groups_after'])
    assert int(row['ffn_before']) > int(row['ffn_after'])
  table = (path / 'sensitivity.md').read_text()
  for layer in range(LAYERS):
    values = [f'{base["layers"][layer]:.2f}' for base in report['bases']]
    assert f'| {layer} | {" | ".join(values)} |' in table
  assert '3 → 2' in table and '2 → 1' in table
  page = (path / 'report.html').read_text()
  assert page.count('<svg') == 2 and '>&lt;x&gt;</span></pre>' in page and 'http-equiv' not in page
  assert {p.name for p in path.glob('*.svg')} == {'perplexity.svg', 'importance.svg'}


@pytest.mark.parametrize(
  'change, words',
  [
    ({'evaluate.source': ()}, 'evaluate.source: mode sensitivity measures'),
    ({'evaluate.source': ('a=a.txt', 'b=b.txt')}, 'evaluate.source: mode sensitivity measures'),
    ({'prune.method': 'slicegpt'}, 'SliceGPT'),
    ({'sensitivity.sparsity': 0.25, 'prune.align_ffn': 48}, 'removes no group of any layer'),
    ({'prune.calibration.samples': 2**20}, 'samples'),
  ],
)
def test_refusals_come_before_the_work(files, tmp_path, change, words):
  config = make_config(files)
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=words):
    start(config, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
