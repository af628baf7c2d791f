"""benchmarks/gpu.py from end to end on the CPU at toy size; and that what it compares computes the same."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.formats.hf_config import config_to_hf
from adapt_jax.models.formats.hf_weights import host_tensors
from adapt_jax.models.network import llama
from adapt_jax.pipeline.flops import forward as forward_flops
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from benchmarks import gpu, side_by_side
from benchmarks.programs import gpu_rows
from tests.support.helpers import random_params


def test_end_to_end(tmp_path, monkeypatch):
  """Every row has its figures, in the section that is written; they are sane."""
  results = tmp_path / 'RESULTS.md'
  results.write_text('# Measured\n')
  monkeypatch.setattr(side_by_side, 'RESULTS', results)
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')  # compiles faster
  found = gpu.run(gpu.TOY, True, 3.0, True)
  assert not {i: row['said'] for i, row in found.items() if 'said' in row}
  by_kind = {}
  for i, row in enumerate(gpu.TOY):
    by_kind.setdefault(row.kind, []).append(found[i])
  [r] = by_kind['attention']  # two forms, as far from fp32 as bf16 is
  assert 0 < max(r['plain errors'] + r['other errors']) < 0.02
  [r] = by_kind['training']
  assert np.log(64) == pytest.approx(r['losses'][0], rel=0.02) and r['losses'][1] < r['losses'][0]
  assert r['flops'] == 3 * forward_flops(gpu_rows.model('toy'), 32) and min(r['seconds']) > 0
  [r] = by_kind['generation']
  assert min(r['prefill'] + r['decode']) > 0
  text = results.read_text()
  assert text.startswith('# Measured\n\n## On one GPU\n') and text.count('| toy |') == 4
  assert all(f'### {kind.capitalize()}\n' in text for kind in gpu.HEADS)
  for line in text.splitlines():  # as many cells as its table has columns
    if line.startswith('|'):
      assert line.count('|') in {heads.count('|') + 2 for heads in gpu.HEADS.values()}


def test_rows():
  assert len({row.name for row in gpu.ROWS}) == len(gpu.ROWS)
  assert {row.kind for row in gpu.ROWS} == {row.kind for row in gpu.TOY} == set(gpu_rows.KINDS)
  assert count_params(gpu_rows.model('135M')) == 134_515_008
  assert count_params(gpu_rows.model('1B')) == 1_235_814_400
  assert count_params(gpu_rows.model('3B')) == 3_212_749_824
  for row in gpu.ROWS:
    assert not row.micro or row.rows % row.micro == 0
    assert row.model == '' or gpu_rows.model(row.model).max_position >= row.length + row.new
  assert sorted(sum(gpu.children(gpu.ROWS, False), [])) == list(range(len(gpu.ROWS)))


@pytest.mark.parametrize('differentiate', [False, True])
def test_flops_are_those_that_the_compiler_counts(differentiate):
  """But for the masked half of attention, which the plain form computes, and what is no product."""
  layers, T = (LayerShape(4, 2, 512),) * 2, 64
  config = ModelConfig('llama', 1000, 192, 32, layers, RopeConfig(1e4), 1e-5, True)

  def loss(params, tokens):
    return jnp.square(llama.apply(config, params, tokens)).sum()

  args = llama.abstract_params(config), jax.ShapeDtypeStruct((2, T), jnp.int32)
  counted = jax.jit(jax.grad(loss) if differentiate else loss).lower(*args).cost_analysis()['flops'] / (2 * T)
  masked = sum(2 * T * s.num_heads * config.head_dim for s in layers)
  assert counted == pytest.approx((3 if differentiate else 1) * (forward_flops(config, T) + masked), rel=0.05)


def test_the_peer_computes_the_same_scores():
  import torch
  import transformers

  config = gpu_rows.model('toy')
  params = random_params(config)
  net = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config_to_hf(config))).eval()
  state = {leaf.name: torch.as_tensor(np.array(x)) for leaf, x in host_tensors(config, params)}
  net.load_state_dict(state, strict=False)
  tokens = gpu_rows.tokens(gpu.Row('scoring', 0, 'toy', 4, 16), config)
  kv, ffn, distance = gpu_rows.peer_scores(net, torch.as_tensor(tokens).long(), 2)
  stacked = surgery.stack(params, PrunePlan.dense(config), jnp.float32)
  scores = jax.jit(Scorer(config, micro_batch=2))(stacked, tokens)
  for ours, theirs in ((scores.kv, kv), (scores.ffn, ffn), (scores.distance, distance)):
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-4)


def test_without_a_pytorch_that_sees_a_card(monkeypatch):
  import torch

  monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
  row = gpu.Row('scoring by PyTorch', 0, '135M', 4, 16)
  assert gpu_rows.measure(row, False, time.time() + 9) == {'said': 'no PyTorch with CUDA here'}


def test_a_card_there_must_be():
  row = gpu.Row('card', 0)
  with pytest.raises(SystemExit, match='JAX sees no GPU here'):
    gpu_rows.measure(row, False, time.time() + 9)


# -- what goes wrong ---------------------------------------------------------------------------------------


def test_no_time_left():
  row = gpu.Row('training', 60, 'toy', 4, 32)
  assert gpu_rows.measure(row, True, time.time() + 30)['said'].startswith('left out: ')
  with pytest.raises(SystemExit, match='no figures without the card: left out: '):
    gpu.run((gpu.Row('card', 20),), False, 0.1, False)


@pytest.mark.parametrize(
  'program,expected',
  [
    ('import time; time.sleep(60)', 'left out: cut off after 2 s'),
    ('raise ValueError("no driver")', 'failed: code 1: ValueError: no driver'),
    ('import os; os.abort()', 'failed: code -6: '),
  ],
)
def test_a_process_that_ends_early(program, expected):
  """Rows that were done stay."""
  command = [sys.executable, '-c', f'print(\'{{"row": 3}}\', flush=True); {program}']
  assert list(gpu.measured(command, 2.0)) == [{'row': 3}, {'ended': expected}]


def test_out_of_memory(monkeypatch):
  def lacking(micro_of_success, remat_of_success):
    def attempt(row, micro, remat, toy):
      if (micro, remat) == (micro_of_success, remat_of_success):
        return {'seconds': [1.0]}
      raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes')

    return attempt

  row = gpu.Row('training', 0, 'toy', 16, 32, micro=8)
  for micro, remat, tries in ((8, False, 0), (8, True, 1), (2, True, 2)):
    monkeypatch.setattr(gpu_rows, '_training', lacking(micro, remat))
    found = gpu_rows.measure(row, True, time.time() + 9)
    assert (found['micro'], found['remat'], len(found['before'])) == (micro, remat, tries)
  monkeypatch.setattr(gpu_rows, '_training', lacking(0, False))
  said = gpu_rows.measure(row, True, time.time() + 9)['said']
  assert said == 'out of memory (8 rows at once, 8 rows at once with remat, 2 rows at once with remat)'
  table = gpu.table('training', (gpu.Row('card', 0), row), {0: {'device': 'x'}, 1: {'said': said}})
  assert table[-1].startswith(f'| {row.name} | {said} | — |')
