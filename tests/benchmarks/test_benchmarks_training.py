"""Benchmarks of training and pruning: their limits from an export's header, and their tables."""

import json
import pathlib
import subprocess
import sys

import pytest

from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.pipeline.flops import forward as forward_flops
from benchmarks import demo_models, pruning, training
from benchmarks.side_by_side import ROOT, Run, replace_section
from tests.support.helpers import random_params, tiny_config


@pytest.fixture(scope='module')
def export(tmp_path_factory):
  config = tiny_config('llama', (LayerShape(6, 3, 40), LayerShape(4, 2, 24)), vocab_size=64)
  path = tmp_path_factory.mktemp('export')
  save_params(config, random_params(config), path)
  return config, path


def test_limits_are_those_of_the_model(export):
  config, path = export
  assert demo_models.parameters(path) == count_params(config)
  assert demo_models.head_weights(path) == config.vocab_size * config.hidden_size
  assert demo_models.forward_flops(path, 64) == pytest.approx(forward_flops(config, 64), rel=0.02)
  head = 2 * demo_models.head_weights(path)
  layers = demo_models.forward_flops(path, 64) - head
  assert pruning.scoring_flops(path) == 4 * layers + 2 * head


def test_tables():
  answer = {'tokens_per_second': [10.0, 30.0, 20.0], 'compile_seconds': 1.5}
  fast, slow = Run(1.0, 2.0, 10**9, answer), Run(2.0, 4.0, 4 * 10**9, answer | {'tokens_per_second': [5.0]})
  runs = {f'ours {a}': [fast] for a, _ in training.PAIRS} | {f'torch {b}': [slow] for _, b in training.PAIRS}
  rows = training.table(runs, {'float32': 1.0, 'bfloat16': 2.0}, 1e7).splitlines()
  assert len(rows) == 2 + len(training.PAIRS)
  assert (
    '| 4.00 (4.00–4.00) | 20% of 100 | 1.00 (1.00–1.00) | 4.00 (4.00–4.00) | 0.25 (0.25–0.25) |' in rows[2]
  )
  for run in (fast, slow):
    run.answer['parameters'] = 1000
  table = pruning.table({'ours float32': [fast], 'torch float32': [slow]})
  assert '| ours float32 | 2.00 (2.00–2.00) | 0.50 (0.50–0.50) | 1.00 (1.00–1.00) | 0.50' in table


def test_programs_that_leave_other_models_are_not_compared():
  pruning.check_sizes({'ours float32': 110_602_944, 'torch float32': 110_606_400})
  with pytest.raises(SystemExit, match='102,?074,?688'):
    pruning.check_sizes({'ours float32': 110_602_944, 'torch float32': 102_074_688})


def test_a_section_is_replaced_alone():
  document = '# All\n\nwords\n\n## One\n\nold\n\n## Two\n\nstays\n'
  assert (
    replace_section(document, 'One', '## One\n\nnew\n')
    == '# All\n\nwords\n\n## One\n\nnew\n\n## Two\n\nstays\n'
  )
  assert replace_section(document, 'Three', '## Three\n\nx\n') == document + '\n## Three\n\nx\n'


def test_limits_of_this_machine():
  command = [sys.executable, str(pathlib.Path('benchmarks/programs/limits.py'))]
  found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
  assert (
    set(found) == {'float32', 'bfloat16', 'gigabytes_per_second', 'gigabytes_read_per_second'}
    and min(found.values()) > 0
  )
