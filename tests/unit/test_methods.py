"""The rule of every pruning method, on random scores."""

import numpy as np
import pytest

from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.models.config import LayerShape, channel_params, count_params
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.methods.flap import standardised
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.scores import Scores
from tests.support.scored import FFN, HEAD, KV, G, make_config, random_scores, run


def make_method(name, config, align_ffn=1, **fields):
  return METHODS[name](config, PruneOptions(align_ffn=align_ffn, **fields))


@pytest.mark.parametrize('name', ['wanda_sp', 'uniform'])
def test_uniform_methods_cut_all_layers_alike(name):
  config, target = make_config(), int(0.75 * count_params(make_config()))
  states = run(make_method(name, config), config, PruneState.start(config), target)
  plan = states[-1].plan
  assert np.ptp(plan.kv_widths) <= 1 and np.ptp(plan.ffn_widths) <= 1


@pytest.mark.parametrize('shares', [(0.75,), (0.9, 0.8, 0.6)])
def test_wanda_sp_prunes_one_layer_after_another_to_the_widths_of_one_shot(shares):
  """In every stage; each layer keeps the best by the scores of its own step."""
  config = make_config()
  method, state = make_method('wanda_sp', config), PruneState.start(config)
  full, equal = method.allocator.full, np.ones(config.num_layers)
  for share in shares:
    target = int(share * count_params(config))
    widths = method.allocator.one_shot(full, equal, target)
    wider = np.flatnonzero((widths.kv < state.plan.kv_widths) | (widths.ffn < state.plan.ffn_widths))
    states = run(method, config, state, target)
    state = states[-1]
    assert len(states) == 1 + len(wider)
    np.testing.assert_array_equal(state.plan.kv_widths, widths.kv)
    np.testing.assert_array_equal(state.plan.ffn_widths, widths.ffn)
    for number, layer in enumerate(wider):
      before, after = states[number].plan.ffn[layer], states[number + 1].plan.ffn[layer]
      values = random_scores(config, number + 1).ffn[layer]
      if (before & ~after).any():
        assert values[after].min() > values[before & ~after].max()
      later = slice(layer + 1, None)
      np.testing.assert_array_equal(states[number].plan.kv[later], states[number + 1].plan.kv[later])
      np.testing.assert_array_equal(states[number].plan.ffn[later], states[number + 1].plan.ffn[later])


@pytest.mark.parametrize('name', ['llm_pruner', 'magnitude'])
def test_llm_pruner_leaves_the_first_four_and_last_two_layers_alone(name):
  config = make_config(layers=9)
  method = make_method(name, config)
  for target in (int(0.95 * count_params(config)), method.smallest()):
    plan = run(method, config, PruneState.start(config), target)[-1].plan
    untouched = (plan.kv_widths == KV) & (plan.ffn_widths == FFN)
    assert untouched.tolist() == [True] * 4 + [False] * 3 + [True] * 2
    for kept, values in zip(plan.ffn[4:7], random_scores(config, 1).ffn[4:7], strict=True):
      assert values[kept].min() > values[~kept].max()


def test_obs_prunes_the_first_layers_attention_last():
  """However little it seems to cost: a model may need it to form its attention sink."""
  config = make_config()
  scores = random_scores(config)
  scores.kv[0] = 0
  method, start = make_method('obs', config), PruneState.start(config)
  nearly = method.smallest() + (2 * G + 2) * HEAD * 32 * (KV - 1)
  plan = method.step(scores, start, nearly).plan
  assert plan.kv_widths.tolist() == [KV] + 7 * [1] and set(plan.ffn_widths) == {1}
  assert method.step(scores, start, method.smallest()).plan.kv_widths[0] == 1


@pytest.mark.parametrize('align', [4, 8, 16])
def test_a_global_ranking_of_equal_scores_gives_no_layer_back_what_went(align):
  """A layer's blocks go from its full width down, though rounding makes a later block's mean smaller."""
  config = make_config(layers=3)
  method, dense = make_method('obs', config, align_ffn=align), PrunePlan.dense(config)
  channel = np.full((3, FFN), 0.1)
  scores = Scores(channel[:, :KV] + 1, channel, np.zeros(3), np.float32(1))  # no KV group is the cheapest
  for share in np.linspace(0.95, 0.6, 30):
    target = int(share * count_params(config))
    plan = method.step(scores, PruneState.start(config), target).plan
    assert target - align * channel_params(config) < plan.params(config) <= target
  removals = list(method._removals(scores, dense))
  for layer in range(3):
    at = [(at, -width) for at, of, is_kv, width in removals if of == layer and not is_kv]
    assert len(at) > 2 and at == sorted(at)


def test_flap_standardises_per_layer_and_module_over_what_is_left():
  torch = pytest.importorskip('torch')
  config = make_config(layers=2)
  scores, plan = random_scores(config), PrunePlan.dense(config)
  plan.kv[1][0] = False
  plan.ffn[1][:7] = False
  found = standardised(scores, plan)

  def z(x):
    return (x - torch.mean(x)) / torch.std(x)

  for layer, (groups, channels) in enumerate([(slice(0, KV), slice(0, FFN)), (slice(1, KV), slice(7, FFN))]):
    columns = torch.tensor(scores.o_columns[layer][groups]).reshape(-1) ** 2
    expected = z(columns).reshape(-1, G * HEAD).mean(1)
    np.testing.assert_allclose(found.kv[layer][groups], expected, rtol=1e-9)
    expected = z(torch.tensor(scores.ffn[layer][channels]))
    np.testing.assert_allclose(found.ffn[layer][channels], expected, rtol=1e-9)


def test_shortgpt_takes_whole_layers_of_lowest_influence_and_no_more_than_it_must():
  config = make_config()
  method, start = make_method('shortgpt', config), PruneState.start(config)
  distance = np.array([-0.5, -0.99, -0.7, -0.9, -0.95, -0.6, -0.8, -0.4])
  scores = random_scores(config)._replace(distance=distance)
  target = int(0.65 * count_params(config))
  state = method.step(scores, start, target)
  gone = np.flatnonzero(~state.plan.present)
  assert set(gone) == set(np.argsort(distance)[: len(gone)])
  per_layer = (count_params(config) - state.plan.params(config)) // len(gone)
  assert target - per_layer < state.plan.params(config) <= target
  assert state.sparsity.tolist() == (~state.plan.present).astype(float).tolist()
  # The next stage goes on with the layers that are left, and one always stays.
  last = method.step(scores, state, method.smallest())
  assert last.plan.present.sum() == 1 and not (last.plan.present & ~state.plan.present).any()


def test_shortgpt_is_sure_of_its_smallest_target_where_layers_differ():
  config = make_config().with_layers((LayerShape(6, 3, 52), LayerShape(2, 1, 20), LayerShape(4, 2, 40)))
  method = make_method('shortgpt', config)
  for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
    scores = Scores(None, None, np.array(order, float), None)
    plan = method.step(scores, PruneState.start(config), method.smallest()).plan
    assert plan.params(config) <= method.smallest()
