"""Plans and surgery: zeroed and compacted models are the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, count_params
from adapt_jax.models.network import llama
from adapt_jax.pruning import surgery
from adapt_jax.pruning.attention_units import QUERY_HEADS
from adapt_jax.pruning.plan import PrunePlan, keep_best
from adapt_jax.pruning.scorer import Scorer
from tests.support.helpers import logits, new_params, stacked_params

PAIRS = (LayerShape(6, 2, 24),) * 3  # of KV heads, with three query heads each


def make_model(seed=0, layers=PAIRS, **kw):
  config = ModelConfig('qwen2', 97, 32, 8, layers, RopeConfig(1e4), 1e-5, True, qkv_bias=True, **kw)
  params = new_params(config, seed)
  for i, layer in enumerate(params['layers']):
    for block in ('attention', 'mlp'):
      for name in layer[block]:
        if name.endswith('_bias'):
          layer[block][name] = jax.random.normal(jax.random.key(100 + i), layer[block][name].shape)
  return config, params


def some_plan(config, seed=0, keep=0.6):
  rng = np.random.default_rng(seed)
  plan = PrunePlan.dense(config)
  for mask in plan.ffn:
    mask[rng.random(mask.size) > keep] = False
  plan.kv[1][0] = False
  return plan


def tokens(config, rows=4, length=12):
  return jax.random.randint(jax.random.key(1), (rows, length), 0, config.vocab_size)


def by_query_heads(config):
  plan = PrunePlan.dense(config, QUERY_HEADS)
  plan.kv[0][0] = plan.kv[1][1:] = False
  for mask in plan.ffn:
    mask[::3] = False
  return plan


@pytest.mark.parametrize(
  'layers,output_bias,make_plan',
  [
    (PAIRS, False, some_plan),
    (PAIRS, True, some_plan),
    (PAIRS, False, lambda config: some_plan(config).without_layer(1)),
    (PAIRS, False, by_query_heads),
    ((LayerShape(4, 1, 24),) * 3, True, by_query_heads),
  ],
)
def test_the_compacted_model_is_the_zeroed_one(layers, output_bias, make_plan):
  config, params = make_model(output_bias=output_bias, layers=layers)
  plan = make_plan(config)
  small, narrow = jax.jit(lambda p: surgery.compact(p, plan))(params), plan.pruned_config(config)
  expected = logits(config, surgery.zero(params, plan), tokens(config))
  np.testing.assert_allclose(logits(narrow, small, tokens(config)), expected, atol=2e-6)
  assert not np.allclose(expected, logits(config, params, tokens(config)), atol=1e-2)
  stored = sum(x.size for x in jax.tree.leaves(small))
  assert plan.params(config) == stored == count_params(narrow)
  dense = PrunePlan.dense(config, plan.unit)
  zeroed, whole = (stacked_params(p, dense) for p in (surgery.zero(params, plan), params))
  masked = surgery.zero_stacked(whole, *surgery.padded_masks(plan), plan.unit)
  jax.tree.map(np.testing.assert_array_equal, masked, zeroed)
  if plan.present.all():  # else norms are gone too
    jax.tree.map(np.testing.assert_array_equal, stacked_params(small, plan), zeroed)
  else:
    np.testing.assert_array_equal(small['layers'][1]['mlp_norm'], params['layers'][2]['mlp_norm'])
    assert [w == 0 for w in plan.widths(config)['num_heads']] == [not x for x in plan.present]
  if plan.unit is QUERY_HEADS:
    assert {s.num_kv_heads for s in narrow.layers} == {layers[0].num_kv_heads}


def test_optimizer_moments_follow_the_survivors():
  config, params = make_model()
  plan = some_plan(config)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
  state, update = tx.init(params), jax.jit(tx.update)  # compiled: op by op it takes seconds
  gradients = jax.tree.map(lambda x: x + 1, params)
  _, state = update(gradients, state, params)
  small = surgery.compact_optimizer(state, params, plan)
  expected = surgery.compact(state[1].mu, plan)
  jax.tree.map(np.testing.assert_array_equal, small[1].mu, expected)
  assert small[1].count == state[1].count
  # The compacted state goes on updating the compacted parameters.
  compacted = surgery.compact(params, plan)
  update(surgery.compact(gradients, plan), small, compacted)


def test_output_biases_count_in_no_score():
  """As members of a group they would change the norms of weights."""
  config, params = make_model()
  dense = PrunePlan.dense(config)
  biased_config, biased = surgery.with_output_bias(config, params)
  for layer in biased['layers']:
    layer['attention']['o_bias'] += 1
    layer['mlp']['down_bias'] += 1
  before, after = (
    jax.jit(Scorer(c, 'l2', micro_batch=2))(stacked_params(p, dense), tokens(config))
    for c, p in ((config, params), (biased_config, biased))
  )
  np.testing.assert_allclose(after.kv, before.kv, rtol=1e-5)
  np.testing.assert_allclose(after.ffn, before.ffn, rtol=1e-5)


def test_added_output_biases_are_zeros_that_train():
  config, params = make_model()
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  biased_config, biased = surgery.with_output_bias(config, params)
  shapes = jax.tree.map(jnp.shape, biased)
  assert shapes == jax.tree.map(jnp.shape, llama.abstract_params(biased_config))
  assert {x.dtype for x in jax.tree.leaves(biased)} == {jnp.dtype(jnp.bfloat16)}
  extra = sum(x.size for x in jax.tree.leaves(biased)) - sum(x.size for x in jax.tree.leaves(params))
  assert extra == count_params(biased_config) - count_params(config) == 3 * 2 * 32
  np.testing.assert_array_equal(
    logits(biased_config, biased, tokens(config)), logits(config, params, tokens(config))
  )
  gradient = jax.jit(jax.grad(lambda p: jnp.square(llama.apply(biased_config, p, tokens(config))).mean()))(
    biased
  )
  for layer in gradient['layers']:
    assert layer['attention']['o_bias'].any() and layer['mlp']['down_bias'].any()
  # What is there stays.
  assert surgery.with_output_bias(biased_config, gradient)[0] == biased_config
  jax.tree.map(np.testing.assert_array_equal, surgery.with_output_bias(biased_config, gradient)[1], gradient)


def gone_plan(config, *layers):
  """`some_plan`, without these layers."""
  plan = some_plan(config)
  for layer in layers:
    plan = plan.without_layer(layer)
  return plan


@pytest.mark.parametrize('gone', [(), (0, 2)])
def test_scores_of_survivors_are_those_of_the_compacted_model(gone):
  """A layer that is gone is scored as one that does nothing."""
  config, params = make_model()
  plan = gone_plan(config, *gone)
  small, narrow = surgery.compact(params, plan), plan.pruned_config(config)
  scores, alone = (
    jax.jit(Scorer(c, micro_batch=2))(stacked_params(small, p), tokens(config))
    for c, p in ((config, plan), (narrow, PrunePlan.dense(narrow)))
  )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(scores))
  np.testing.assert_allclose(scores.distance[~plan.present], -1, rtol=1e-6)
  np.testing.assert_array_equal(scores.ffn[~plan.present], 0)
  for own, i in enumerate(np.flatnonzero(plan.present)):
    for ours, theirs, mask in (
      (scores.kv[i], alone.kv[own], plan.kv[i]),
      (scores.ffn[i], alone.ffn[own], plan.ffn[i]),
    ):
      np.testing.assert_allclose(ours[mask], theirs[: mask.sum()], rtol=2e-5, atol=1e-9)
      np.testing.assert_array_equal(ours[~mask], 0)


def test_relative_plans_compose():
  config, params = make_model()
  for first, second in (
    (some_plan(config, keep=0.8), some_plan(config, keep=0.4)),
    (gone_plan(config, 1), gone_plan(config, 1, 0)),
  ):
    once = surgery.compact(params, second)
    twice = surgery.compact(surgery.compact(params, first), second.relative_to(first))
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    with pytest.raises(ValueError, match='cannot keep'):
      first.relative_to(second)


def test_keep_best_keeps_the_highest_of_those_still_there():
  config, _ = make_model()
  plan = PrunePlan.dense(config)
  plan.ffn[0][5] = False
  kv, ffn = np.zeros((3, 2)), np.tile(np.arange(24.0), (3, 1))
  kv[:, 0] = 1
  ffn[0, 5] = 1e9  # removed before: its score does not bring it back
  out = keep_best(plan, kv, ffn, np.array([1, 2, 1]), np.array([3, 24, 2]))
  assert np.flatnonzero(out.ffn[0]).tolist() == [21, 22, 23]
  assert out.ffn[1].all() and np.flatnonzero(out.ffn[2]).tolist() == [22, 23]
  assert [m.tolist() for m in out.kv] == [[True, False], [True, True], [True, False]]


def test_of_equally_scored_groups_the_first_ones_stay():
  """Whatever the sort: else the same scores would give another model elsewhere, or after a resume."""
  config = ModelConfig('llama', 64, 32, 8, (LayerShape(32, 32, 200),) * 2, RopeConfig(1e4), 1e-5, True)
  plan = PrunePlan.dense(config)
  plan.ffn[1][:3] = False
  kv, ffn = np.ones((2, 32), np.float32), np.ones((2, 200), np.float32)
  ffn[1, 1::2] = 2.0  # the better half of the second layer, of which index 1 has gone
  out = keep_best(plan, kv, ffn, np.array([20, 7]), np.array([90, 120]))
  assert [np.flatnonzero(m).tolist() for m in out.kv] == [list(range(20)), list(range(7))]
  assert np.flatnonzero(out.ffn[0]).tolist() == list(range(90))
  better, equal = set(range(3, 200, 2)), sorted(range(4, 200, 2))
  assert set(np.flatnonzero(out.ffn[1])) == better | set(equal[: 120 - len(better)])
