"""Costs in every unit beside independent counts, and landing on a target in every unit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.mode_options import BenchOptions
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.config.units import UNITS
from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import kv_cache, llama
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.schedule import stage_targets
from adapt_jax.pruning import budget as budgets
from adapt_jax.pruning import file_size, latency
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.scores import Scores
from tests.support.helpers import tiny_config
from tests.support.scored import FFN, HEAD, HIDDEN, KV, G, make_config, run

REQUEST = BenchOptions(prompt_length=24, new_tokens=9, batch=2)


def uneven(layers=8, tie=True, **fields):
  """A model whose layers differ, as after a pruning."""
  config = make_config(layers, tie, **fields)
  shapes = [LayerShape(G * (1 + i % KV), 1 + i % KV, FFN - 3 * i) for i in range(layers)]
  return config.with_layers(tuple(shapes))


def make_table(config, concave=False):
  """Seconds that grow with the widths, in a prefill and a decoding step; concave: steeper where narrow."""
  bend = (1.3, 1.0) if concave else (1.0, 1.0)

  def phase(unit):
    kv = latency.Curve((1, KV), (2 * unit * bend[0], 2 * KV * unit * bend[1]))
    ffn = latency.Curve((FFN // 4, FFN), (FFN // 4 * unit / 9 * bend[0], FFN * unit / 9 * bend[1]))
    return latency.Phase(7 * unit, 0.3 * unit, kv, ffn)

  request = latency.request_of(REQUEST)
  return latency.Table('table', latency.likeness(config), request, phase(1e-3), phase(1e-4))


def make_budget(kind, config, concave=False):
  if kind in ('latency', 'decode'):
    return latency.budget(make_table(config, concave), config, kind)
  of_kind = {
    'params': lambda: budgets.params(config),
    'flops': lambda: budgets.flops(config, 64),
    'kv_cache': lambda: budgets.kv_cache(config, 2),
    'memory': lambda: budgets.memory(config, 2, 64),
    'file': lambda: file_size.hf(config, 2),
  }
  return of_kind[kind]()


def widths(config):
  return np.array([s.num_kv_heads for s in config.layers]), np.array([s.ffn for s in config.layers])


@pytest.mark.parametrize('fields', [{}, {'tie': False}, {'qkv_bias': True, 'output_bias': True}])
def test_params_and_bytes_of_weights_are_those_of_the_arrays(fields):
  dense, config = make_config(**fields), uneven(**fields)
  arrays = jax.tree.leaves(llama.abstract_params(config, jnp.bfloat16))
  assert budgets.params(dense).cost(*widths(config)) == sum(x.size for x in arrays)
  cached = budgets.memory(dense, 2, 10).cost(*widths(config))
  kv = 10 * budgets.kv_cache(dense, 2).cost(*widths(config))
  assert cached - kv == sum(x.size * x.dtype.itemsize for x in arrays)


def test_bytes_of_the_cache_are_those_of_the_generators_arrays():
  dense, config, slots = make_config(), uneven(), 24
  tokens, lengths = jnp.zeros((2, 16), jnp.int32), jnp.full(2, 16)
  _, cache = jax.eval_shape(
    lambda params: kv_cache.prefill(config, params, tokens, lengths, slots, dtype=jnp.bfloat16),
    llama.abstract_params(config, jnp.bfloat16),
  )
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  budget = budgets.kv_cache(dense, 2)
  assert budget.cost(*widths(config)) * 2 * slots == held
  assert not budget.counts_mlp


@pytest.mark.parametrize('tie', [True, False])
def test_operations_are_those_of_the_compiled_program(tie):
  """By XLA's count of a program without norms and softmax: only the products of a model as wide as this."""
  config, length = dataclasses.replace(uneven(2, tie), hidden_size=256, vocab_size=1024), 64
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  program = jax.jit(lambda p, t: llama.apply(config, p, t)).lower(llama.abstract_params(config), tokens)
  counted = program.compile().cost_analysis()['flops'] / length
  dense = dataclasses.replace(make_config(2, tie), hidden_size=256, vocab_size=1024)
  found = budgets.flops(dense, length).cost(*widths(config))
  # The program computes the masked half of the attention too.
  masked = sum(2 * length * s.num_heads * HEAD for s in config.layers)
  assert found + masked == pytest.approx(counted, rel=0.02)


def test_a_latency_is_the_sum_of_its_table():
  """One prefill and a step for each new token after the first; linear between the widths, and below."""
  dense, config = make_config(), uneven()
  table, found = make_table(dense), 0.0
  for phase, times in ((table.prefill, 1), (table.decode, REQUEST.new_tokens - 1)):
    unit = phase.fixed / 7
    blocks = sum(2 * s.num_kv_heads * unit + s.ffn * unit / 9 + phase.rest for s in config.layers)
    step = phase.fixed + blocks
    found += times * step
  budget = latency.budget(table, dense)
  assert budget.number(budget.cost(*widths(config))) == pytest.approx(1000 * found, rel=1e-9)
  of_step = latency.budget(table, dense, 'decode')
  assert of_step.number(of_step.cost(*widths(config))) == pytest.approx(1000 * step, rel=1e-9)
  assert latency.Curve((2, 4, 8), (3.0, 4.0, 8.0)).at(8).tolist() == [2, 2.5, 3, 3.5, 4, 5, 6, 7, 8]


def test_a_roofline_takes_the_longer_of_products_and_reads():
  config = make_config(tie=False)
  table = latency.roofline('h100', config, REQUEST)
  peak, bandwidth = 989e12, 3350e9
  B, P, N = REQUEST.batch, REQUEST.prompt_length, REQUEST.new_tokens
  channel = 3 * HIDDEN
  assert table.prefill.mlp.seconds[0] == pytest.approx(
    max(2 * channel * B * P / peak, 2 * channel / bandwidth)
  )
  group = (2 + 2 * G) * HEAD * HIDDEN
  reads = 2 * (group + 2 * HEAD * B * (P + N / 2))
  assert table.decode.attention.seconds[0] == pytest.approx(reads / bandwidth)  # so little is bound by reads
  assert table.decode.fixed == pytest.approx(2 * 101 * HIDDEN / bandwidth)
  many = latency.roofline('h100', config, dataclasses.replace(REQUEST, batch=1000, prompt_length=500))
  assert many.prefill.mlp.seconds[0] == pytest.approx(2 * channel * 500_000 / peak)


def make_method(name, config, budget, align_ffn=1):
  return METHODS[name](config, PruneOptions(align_ffn=align_ffn), budget)


@pytest.mark.parametrize('kind', [*UNITS, QUERY_HEADS.name])
@pytest.mark.parametrize('name', METHODS)
def test_every_method_lands_on_a_target_in_every_unit(name, kind):
  """Never above; below by less than one block, which is a layer for shortgpt and a group of the KV cache."""
  config, align = make_config(layers=14), 4
  by_heads = kind == QUERY_HEADS.name
  budget = budgets.params(config, QUERY_HEADS) if by_heads else make_budget(kind, config, concave=True)
  unit = budget.removes
  method = make_method(name, config, budget, align_ffn=align)
  state = PruneState.start(config, unit)
  layer = budget.layers[0]
  block = layer.attention[1] if budget.coarse else max(np.diff(layer.mlp[::align]))
  assert budget.coarse == (kind == 'kv_cache')
  block += layer.attention[1] if name == 'wanda_sp' else 0  # as its docstring says of a second stage
  block = layer.rest + layer.attention[-1] + layer.mlp[-1] if name == 'shortgpt' else block
  for share in (0.9, 0.8):
    target = int(share * budget.dense)
    before, state = state, run(method, config, state, target, unit)[-1]
    assert target - block < state.plan.cost(budget) <= target
    state.plan.relative_to(before.plan)  # raises if something came back
    if kind == 'kv_cache' and name != 'shortgpt':
      assert (state.plan.ffn_widths == FFN).all()
    if by_heads:
      small = state.plan.pruned_config(config)
      assert state.plan.unit is unit and all(s.num_kv_heads == KV for s in small.layers)
  run(method, config, state, method.smallest(), unit)


def test_obs_takes_what_costs_least_per_unit_of_the_budget():
  """A budget in which attention is dear takes KV groups that parameters would leave."""
  config = make_config()
  rng = np.random.default_rng(0)
  scores = Scores(100 * rng.random((8, KV)), rng.random((8, FFN)), np.zeros(8), np.float32(1))
  kept = {}
  for kind, tokens in (('params', 0), ('memory', 0), ('long', 4096)):
    budget = budgets.memory(config, 2, tokens) if kind != 'params' else budgets.params(config)
    plan = (
      make_method('obs', config, budget).step(scores, PruneState.start(config), int(0.8 * budget.dense)).plan
    )
    kept[kind] = plan
    group, channel = budget.layers[0].attention[1], budget.layers[0].mlp[1]
    gone = [scores.kv[~np.array(plan.kv)] / group, scores.ffn[~np.array(plan.ffn)] / channel]
    stay = scores.ffn[np.array(plan.ffn) & (plan.ffn_widths > 1)[:, None]] / channel
    assert max(map(max, filter(len, gone))) <= min(stay)
  assert kept['params'].equals(kept['memory'])
  assert kept['long'].kv_widths.sum() < kept['params'].kv_widths.sum()


def test_targets_are_fractions_or_numbers_of_the_unit():
  config = make_config()
  budget = make_budget('latency', config)
  ms = budget.number(budget.dense)
  assert 10 < ms < 1000 and budget.text(budget.dense) == f'{ms:.4g} ms'
  assert budget.target(0.5) == budget.dense // 2 and budget.target(12.5) == 12.5e9
  targets = stage_targets(budget, 0.8, 2, 'linear')
  assert targets == [int(0.9 * budget.dense), int(0.8 * budget.dense)]
  with pytest.raises(InputError, match=r'prune\.target = 99999 allows .* ms, but the model has only'):
    stage_targets(budget, 99_999, 1, 'linear')


def options_of(**fields):
  return from_dict({'prune': fields, 'bench': {'prompt_length': 100, 'new_tokens': 28, 'batch': 3}})


def test_a_budget_follows_the_options():
  """Bytes of the exported dtype, the request of mode bench, and no biases in the dense model."""
  config = make_config()
  found = budget_of(options_of(target='1kv'), config, 'float32')
  assert found.dense == 8 * KV * 2 * HEAD * 4
  found = budget_of(options_of(target='1memory'), config, 'bfloat16')
  assert found.dense == 2 * count_params(config) + 3 * 128 * 8 * KV * 2 * HEAD * 2
  assert budget_of(options_of(target='1flops'), config).dense == budgets.flops(config, 128).dense
  biased = budget_of(options_of(compensate='bias'), config)
  assert biased.dense == count_params(config)
  assert PrunePlan.dense(config).cost(biased) == count_params(dataclasses.replace(config, output_bias=True))
  by_name = budget_of(options_of(target='1latency', latency_table='h100'), config)
  assert by_name.kind == 'latency' and by_name.dense > 0
  step = budget_of(options_of(target='20tok/s', latency_table='h100'), config)
  assert 0 < by_name.dense - 27 * step.dense < by_name.dense  # the prefill
  assert step.target('20tok/s') == 3 * step.unit.parts * 50  # three rows, of 50 ms for each token


def write_table(path, config, **changes):
  def phase(of):
    curves = {
      k: {'widths': [*v.widths], 'seconds': [*v.seconds]}
      for k, v in (('attention', of.attention), ('mlp', of.mlp))
    }
    return {'fixed': of.fixed, 'rest': of.rest, **curves}

  table = make_table(config)
  found = {'model': table.model, 'request': table.request, 'prefill': phase(table.prefill)}
  found |= {'decode': phase(table.decode), 'unit': 'kv_groups'} | changes
  report = {'device': '1 x cpu', 'backend': 'cpu', 'dtype': 'float32', 'latency': found}
  path.write_text(json.dumps(report))
  return str(path)


def test_a_table_is_read_as_it_was_written(tmp_path):
  config = make_config()
  name = write_table(tmp_path / 'report.json', config)
  found = latency.find_table(name, config, BenchOptions())
  expected = dataclasses.replace(make_table(config), name=name, where=found.where)
  assert found == expected and found.where['device'] == '1 x cpu'


# A phase of which one part is then replaced.
CURVE = {'widths': [3, 52], 'seconds': [1, 2]}
BAD = {'fixed': 1.0, 'rest': 0.0, 'attention': CURVE, 'mlp': CURVE}


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'request': {'batch': 1}}, 'report.json that --mode=bench wrote'),
    ({'prefill': BAD | {'fixed': float('nan')}}, 'out of range'),
    ({'decode': BAD | {'mlp': {'widths': [13, 52], 'seconds': [-1e308, 1e308]}}}, 'out of range'),
    ({'request': {'batch': 1, 'prompt_length': 1, 'new_tokens': 10**400}}, 'OverflowError'),
    ({'model': {'hidden_size': 64, 'head_dim': 8, 'group_size': 2, 'vocab_size': 101}}, 'hidden_size 64'),
  ],
)
def test_a_bad_or_foreign_table_is_refused(tmp_path, changes, words):
  name = write_table(tmp_path / 'report.json', make_config(), **changes)
  with pytest.raises(InputError, match=words) as error:
    latency.budget(latency.find_table(name, make_config(), BenchOptions()), make_config())
  assert 'prune.latency_table' in str(error.value) and '\n' not in str(error.value)


def test_a_table_that_does_not_reach_the_model_or_is_missing_is_refused(tmp_path):
  name = write_table(tmp_path / 'report.json', make_config())
  wide = make_config().with_layers((LayerShape(KV * G, KV, 2 * FFN),) * 2)
  with pytest.raises(InputError, match=r'goes up to 52 MLP channels, but model.source has 104'):
    latency.find_table(name, wide, BenchOptions())
  with pytest.raises(InputError, match=r'prune\.latency_table .*absent\.json'):
    latency.find_table(str(tmp_path / 'absent.json'), wide, BenchOptions())
  flat = dataclasses.replace(make_table(make_config()).prefill, mlp=latency.Curve((13, 52), (1.0, 1.0)))
  table = dataclasses.replace(make_table(make_config()), prefill=flat, decode=flat)
  with pytest.raises(InputError, match='narrower layers are no faster'):
    latency.budget(table, make_config())


def test_a_table_decides_what_attention_loses_where_the_model_suits_it(tmp_path):
  """With prune.attention=auto; a table by KV heads thus stays of use for a model with one in each layer."""
  single, mixed = (tiny_config('llama', (LayerShape(3, n, 32), LayerShape(3, 1, 32))) for n in (1, 3))
  curve = {'widths': [1, 3], 'seconds': [1e-5, 3e-5]}
  phase = {'fixed': 1e-4, 'rest': 1e-5, 'attention': curve, 'mlp': {'widths': [12, 48], 'seconds': [1, 2]}}

  def removed(unit, config):
    fields = {'model': latency.likeness(single, unit), 'prefill': phase, 'decode': phase, 'unit': unit.name}
    table = write_table(tmp_path / 'table.json', make_config(), **fields)
    return budget_of(options_of(target='1latency', latency_table=table), config).removes

  assert removed(KV_GROUPS, single) is KV_GROUPS and removed(QUERY_HEADS, single) is QUERY_HEADS
  assert budget_of(options_of(target='1latency', latency_table='h100'), single).removes is QUERY_HEADS
  for unit in (KV_GROUPS, QUERY_HEADS):  # its layers differ in what a unit of either kind has
    with pytest.raises(InputError, match='as many query heads per KV head in every layer'):
      removed(unit, mixed)


def test_noise_in_a_table_never_makes_a_removal_cost_time():
  config = make_config()
  noisy = latency.Curve((13, 26, 39, 52), (1.0, 3.0, 2.5, 4.0))
  phase = dataclasses.replace(make_table(config).prefill, mlp=noisy)
  table = dataclasses.replace(make_table(config), prefill=phase, decode=phase)
  assert all((np.diff(layer.mlp) >= 0).all() for layer in latency.budget(table, config).layers)
