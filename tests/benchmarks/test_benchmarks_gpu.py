"""benchmarks/gpu.py from end to end on the CPU at toy size; and that what it compares computes the same."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.machine.compiler import Compiler
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
from tests.programs.test_lowering import lower
from tests.support.helpers import random_params


@pytest.mark.nightly
def test_end_to_end(tmp_path, monkeypatch):
  """Every row has its figures, in the section that is written; they are sane."""
  results = tmp_path / 'RESULTS.md'
  results.write_text('# Measured\n')
  monkeypatch.setattr(side_by_side, 'RESULTS', results)
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')  # compiles faster
  found = gpu.run(gpu.TOY, True, 5.0, True)
  assert not {i: row['said'] for i, row in found.items() if 'said' in row}
  by_kind = {}
  for i, row in enumerate(gpu.TOY):
    by_kind.setdefault(row.kind, []).append(found[i])
  [r] = by_kind['attention']  # two forms, as far from fp32 as bf16 is
  assert 0 < max(r['plain errors'] + r['other errors']) < 0.02
  plain, taught = by_kind['training']
  assert np.log(64) == pytest.approx(plain['losses'][0], rel=0.02) and plain['losses'][1] < plain['losses'][0]
  assert taught['losses'][1] < 0.01  # of the model to itself
  assert taught['kernels'][0][1] > 0
  first, *others = by_kind['pipeline']  # all on this CPU
  for r in others:
    assert r['removed'] == first['removed'] and r['pruned'] == pytest.approx(first['pruned'], rel=1e-6)
  for name in ('dense', 'pruned', 'healed'):  # of random weights
    assert first[name] == pytest.approx(64, rel=0.05)
  [r] = by_kind['checkpoint']
  assert min(r['save'] + r['restore']) > 0 and r['bytes'] > 12 * count_params(gpu_rows.model('toy'))
  assert plain['flops'] == 3 * forward_flops(gpu_rows.model('toy'), 32) == 3 / 4 * taught['flops']
  for [r] in (by_kind['curvature'], by_kind['least squares']):
    assert min(r['seconds']) > 0 and r['planned'] > 0
  [r] = by_kind['generation']
  assert min(r['prefill'] + r['decode']) > 0
  text = results.read_text()
  assert text.startswith('# Measured\n\n## On one GPU\n') and text.count('| toy |') == 8
  assert all(f'### {kind.capitalize()}\n' in text for kind in gpu.HEADS)
  for line in text.splitlines():  # as many cells as its table has columns
    if line.startswith('|'):
      assert line.count('|') in {heads.count('|') + 2 for heads in gpu.HEADS.values()}


@pytest.mark.parametrize(
  'row',
  [r for r in gpu.TOY if r.model and r.kind not in ('checkpoint', 'scoring by PyTorch')],
  ids=lambda row: row.name,
)
def test_the_programs_lower_for_gpus(row, monkeypatch):
  """The first of each row, which is not compiled then; test_lowering.py lowers all of the library."""

  class Lowered(Exception):
    pass

  def call(self, name, fn, *args, **options):
    lower(fn, *args)
    raise Lowered

  monkeypatch.setattr(Compiler, '__call__', call)
  with pytest.raises(Lowered):
    gpu_rows.KINDS[row.kind](row, True)


def test_every_model_exists():
  assert all(gpu_rows.model(row.model).num_layers for row in gpu.ROWS if row.model)


def test_flops_are_those_that_the_compiler_counts():
  """But for the masked half of attention, which the plain form computes, and what is no product."""
  layers, T = (LayerShape(4, 2, 512),) * 2, 64
  config = ModelConfig('llama', 1000, 192, 32, layers, RopeConfig(1e4), 1e-5, True)

  def loss(params, tokens):
    return jnp.square(llama.apply(config, params, tokens)).sum()

  args = llama.abstract_params(config), jax.ShapeDtypeStruct((2, T), jnp.int32)
  counted = jax.jit(jax.grad(loss)).lower(*args).cost_analysis()['flops'] / (2 * T)
  masked = sum(2 * T * s.num_heads * config.head_dim for s in layers)
  assert counted == pytest.approx(3 * (forward_flops(config, T) + masked), rel=0.05)


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
