"""Query heads as the unit of attention (`prune.attention`): plans, surgery, costs, scores, compensation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.mode_options import BenchOptions
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.models.config import LayerShape, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.pruning import budget as budgets
from adapt_jax.pruning import compensate, curvature, latency, surgery
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS, find_unit
from adapt_jax.pruning.compensate import Compensator
from adapt_jax.pruning.methods.obs import Obs
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import steps
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.pruning.widths import Allocator, Widths
from tests.support.helpers import logits, random_params, random_tokens, stacked_params, tiny_config

# One KV head with four query heads, and two with three each.
SINGLE, PAIR = (LayerShape(4, 1, 32),) * 3, (LayerShape(6, 2, 32),) * 3
KINDS = [('gemma3_text', SINGLE), ('qwen2', PAIR), ('qwen3', PAIR), ('llama', SINGLE)]


def some_plan(config):
  plan = PrunePlan.dense(config, QUERY_HEADS)
  plan.kv[0][0] = plan.kv[1][1:] = False
  for mask in plan.ffn:
    mask[::3] = False
  return plan


def test_a_plan_survives_json_and_later_plans_are_renumbered():
  config = tiny_config('qwen2', PAIR)
  plan = some_plan(config)
  state = PruneState(plan, np.zeros(3), 2)
  found = PruneState.from_json(state.to_json(), config).plan
  assert found.equals(plan) and found.unit is QUERY_HEADS
  assert list(state.to_json()['layers'][0]) == ['query_heads', 'ffn_channels']
  later = dataclasses.replace(plan, kv=(np.array([False, False, True]), *plan.kv[1:]))
  assert [m.tolist() for m in later.relative_to(plan).kv] == [[False, True], [True], [True, True, True]]
  assert later.relative_to(plan).unit is QUERY_HEADS
  without = PrunePlan.dense(config).without_layer(1)
  assert PrunePlan.from_json(json.loads(json.dumps(without.to_json())), config).equals(without)
  gone = plan.without_layer(1).widths(config)
  assert gone['num_heads'] == [4, 0, 6] and gone['num_kv_heads'] == [2, 0, 2]


@pytest.mark.parametrize('family, layers', KINDS)
@pytest.mark.parametrize('kind', ['params', 'flops', 'memory'])
def test_costs_are_those_of_the_smaller_model(family, layers, kind):
  config = tiny_config(family, layers)
  make = {
    'params': budgets.params,
    'flops': lambda config, unit: budgets.flops(config, 100, unit),
    'memory': lambda config, unit: budgets.memory(config, 2, 100, unit),
  }[kind]
  budget, plan = make(config, QUERY_HEADS), some_plan(config)
  assert budget.dense == make(config, KV_GROUPS).dense
  assert plan.cost(budget) == make(plan.pruned_config(config), KV_GROUPS).dense
  if kind == 'params':
    assert plan.cost(budget) == count_params(plan.pruned_config(config))


@pytest.mark.parametrize('family, layers', KINDS)
def test_latencies_at_the_peaks_are_those_of_the_smaller_model(family, layers):
  """By either unit, for a request so small that reading the weights takes longest."""
  config, request, unit = tiny_config(family, layers), BenchOptions(prompt_length=8), QUERY_HEADS

  def of(config, unit):
    return latency.budget(latency.find_table('h100', config, request, unit), config)

  budget, narrow = of(config, unit), [unit.narrowed(s, 2, s.ffn) for s in layers]
  smaller = of(config.with_layers(narrow), KV_GROUPS)
  rounding = 2 * config.num_layers  # the picoseconds of each block of a layer are whole
  assert budget.removes is QUERY_HEADS and abs(of(config, KV_GROUPS).dense - budget.dense) <= rounding
  assert abs(budget.cost([2] * 3, [s.ffn for s in layers]) - smaller.dense) <= rounding
  mixed = config.with_layers([*layers[:2], LayerShape(4, 4, 32)])
  with pytest.raises(
    InputError, match=r'prune.latency_table needs as many KV heads in every layer, but .* has \['
  ):
    of(mixed, unit)


def test_auto_takes_query_heads_where_no_kv_head_can_go():
  single, pair = tiny_config('gemma3_text', SINGLE), tiny_config('qwen2', PAIR)
  mixed = tiny_config('llama', (LayerShape(6, 2, 32), LayerShape(4, 2, 32)))  # pruned by query heads before

  def found(config, **fields):
    return find_unit(PruneOptions(**fields), config)

  assert found(single) is found(single, target='0.8flops') is found(mixed) is QUERY_HEADS
  assert found(single, target='0.8latency') is QUERY_HEADS
  assert found(single, target='0.8kv') is KV_GROUPS
  assert found(pair) is KV_GROUPS
  assert found(pair, attention='query_heads') is QUERY_HEADS
  assert found(single, attention='kv_groups') is KV_GROUPS


def test_a_budget_that_query_heads_do_not_change_is_refused():
  with pytest.raises(InputError, match="prune.attention = 'query_heads'.* of kv"):
    from_dict({'prune': {'attention': 'query_heads', 'target': '0.5kv'}})


def test_scores_are_those_of_the_heads_alone():
  """Against the same model with every query head on a KV head of its own, whose groups are single heads."""
  config = tiny_config('gemma3_text', SINGLE)
  params, tokens = random_params(config), jnp.asarray(random_tokens(config, rows=4))
  apart = config.with_layers(tuple(dataclasses.replace(s, num_kv_heads=4) for s in config.layers))

  def spread(layer):
    attention = dict(layer['attention'])
    attention['q'] = attention['q'].swapaxes(0, 1)
    attention['o'] = attention['o'].swapaxes(1, 2)
    attention |= {name: np.repeat(attention[name], 4, 0) for name in ('k', 'v')}
    return layer | {'attention': attention}

  wide = params | {'layers': [spread(layer) for layer in params['layers']]}
  stacked = stacked_params(params, PrunePlan.dense(config, QUERY_HEADS))
  wide = stacked_params(wide, PrunePlan.dense(apart))
  for importance in ('curvature', 'fluctuation', 'wanda'):  # by columns of o_proj: without k and v
    ours = jax.jit(Scorer(config, importance, micro_batch=2, unit=QUERY_HEADS))(stacked, tokens)
    theirs = jax.jit(Scorer(apart, importance, micro_batch=2))(wide, tokens)
    assert ours.kv.shape == (3, 4)
    np.testing.assert_allclose(ours.kv, theirs.kv, rtol=2e-3)
    if ours.o_columns is not None:
      np.testing.assert_allclose(ours.o_columns, theirs.o_columns, rtol=1e-4)


@pytest.mark.parametrize('importance', ['l1', 'taylor'])
def test_scores_sum_the_weights_of_a_head(importance):
  config = tiny_config('qwen2', PAIR)
  params, tokens = random_params(config), jnp.asarray(random_tokens(config, rows=4))
  stacked = stacked_params(params, PrunePlan.dense(config, QUERY_HEADS))
  scores = jax.jit(Scorer(config, importance, micro_batch=2, unit=QUERY_HEADS))(stacked, tokens)
  scored = params
  if importance == 'taylor':

    def loss(params):
      log_p = jax.nn.log_softmax(llama.apply(config, params, tokens)[:, :-1])
      return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    scored = jax.tree.map(jnp.multiply, params, jax.jit(jax.grad(loss))(params))
  for i, layer in enumerate(scored['layers']):
    q, o, bias = (np.abs(layer['attention'][name]) for name in ('q', 'o', 'q_bias'))
    np.testing.assert_allclose(
      scores.kv[i], q.sum((0, 2, 3)) + o.sum((0, 1, 3)) + bias.sum((0, 2)), rtol=1e-3
    )


def test_group_costs_of_pairs_are_those_of_the_same_columns_put_together():
  rng = np.random.default_rng(0)
  weight, x = rng.standard_normal((5, 2, 3, 2)), rng.standard_normal((50, 12))
  gradients = np.eye(5)
  ours = curvature.group_costs(jnp.float32(weight), jnp.float32(x.T @ x), gradients, QUERY_HEADS)
  order = np.arange(12).reshape(2, 3, 2).swapaxes(0, 1).reshape(-1)
  moved = weight.reshape(5, 12)[:, order].reshape(5, 3, 2, 2)
  theirs = curvature.group_costs(jnp.float32(moved), jnp.float32((x.T @ x)[order][:, order]), gradients)
  np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_layers_of_other_heads_stack_and_those_of_other_kv_heads_do_not():
  mixed = tiny_config('llama', (LayerShape(4, 1, 32), LayerShape(2, 1, 32)))
  assert Scorer(mixed, unit=QUERY_HEADS).shape.num_heads == 4
  with pytest.raises(InputError, match="numbers of query heads per KV head .* = 'query_heads'"):
    _ = Scorer(mixed).shape
  with pytest.raises(InputError, match="numbers of KV heads .* = 'kv_groups'"):
    _ = Scorer(tiny_config('llama', (LayerShape(4, 1, 32), LayerShape(8, 2, 32))), unit=QUERY_HEADS).shape
  both = tiny_config('llama', (LayerShape(4, 1, 32), LayerShape(4, 2, 32)))
  for unit in (KV_GROUPS, QUERY_HEADS):
    with pytest.raises(InputError, match='cannot be pruned again'):
      _ = Scorer(both, unit=unit).shape


def test_a_plan_of_another_unit_is_refused():
  class Careless(Obs):
    def step(self, scores, state, target):
      return dataclasses.replace(state, plan=PrunePlan(state.plan.kv, state.plan.ffn))

  config = tiny_config('llama', SINGLE)
  method = Careless(config, PruneOptions(), budgets.params(config, QUERY_HEADS))
  state = PruneState.start(config, QUERY_HEADS)
  with pytest.raises(InputError, match='Careless returned a plan of kv_groups instead of query_heads'):
    next(steps(method, config, state, 1, lambda state: None))


def test_least_squares_bring_the_logits_closer():
  config = tiny_config('qwen2', PAIR)
  params, plan, tokens = random_params(config), some_plan(config), random_tokens(config, rows=8)
  dense = PrunePlan.dense(config, QUERY_HEADS)
  masks = tuple(map(jnp.asarray, surgery.padded_masks(plan)))
  program = jax.jit(Compensator(config, 'least_squares', 4, unit=QUERY_HEADS))
  changes = program(stacked_params(params, dense), masks, jnp.asarray(tokens))
  K, G, H = changes['o'].shape[2:]
  gone = np.asarray(changes['o'])[0][:, :, ~plan.kv[0]]
  assert (K, G) == (2, 3) and not gone.any() and np.asarray(changes['o'])[0].any()
  new = compensate.add(params, dense, changes)
  before, expected = (
    logits(config, params, tokens),
    logits(plan.pruned_config(config), surgery.compact(params, plan), tokens),
  )
  after = logits(plan.pruned_config(config), surgery.compact(new, plan), tokens)
  assert np.square(after - before).mean() < 0.7 * np.square(expected - before).mean()
  # The same changes for a model that was compacted before.
  later = compensate.add(surgery.compact(params, plan), plan, changes)
  jax.tree.map(np.testing.assert_allclose, later, surgery.compact(new, plan))


def test_the_schedule_rounds_heads_as_it_rounds_groups():
  config = tiny_config('llama', SINGLE)
  allocator = Allocator(config, align_kv=1, budget=budgets.params(config, QUERY_HEADS))
  found = allocator.widths(np.array([0.0, 0.5, 0.99]))
  assert found.kv.tolist() == [4, 2, 1]
  assert allocator.cost(Widths(found.kv, found.ffn)) < allocator.budget.dense
  joint = tiny_config('olmo2', PAIR)  # whose norm spans all heads
  assert Allocator(joint, budget=budgets.params(joint, QUERY_HEADS)).narrower(True, 3) == 0
