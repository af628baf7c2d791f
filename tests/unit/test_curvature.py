"""Costs of groups against the quadratic problem itself, solved in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network import backend, llama
from adapt_jax.pruning import algebra, curvature, surgery
from adapt_jax.pruning.compensate import Compensator
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from tests.support.helpers import new_params, stacked_params

D, C = 6, 12


def damped(matrix, damping):
  diagonal = np.diagonal(matrix)
  return matrix + np.diag(damping * np.median(diagonal) + 1e-4 * diagonal)


def problem(seed=0):
  """A weight, second moments of correlated inputs and of gradients."""
  rng = np.random.default_rng(seed)
  inputs = rng.normal(size=(200, C)) @ rng.normal(size=(C, C))
  gradients = rng.normal(size=(200, D)) @ rng.normal(size=(D, D))
  return rng.normal(size=(D, C)), inputs.T @ inputs / 200, gradients.T @ gradients / 200


def removal_cost(weight, inputs, gradients, columns):
  """min tr(G Δ H Δᵀ) with W + Δ zero at `columns`, by solving for the columns that stay."""
  stay = np.setdiff1d(np.arange(C), columns)
  delta = np.zeros_like(weight)
  delta[:, columns] = -weight[:, columns]
  delta[:, stay] = -(delta[:, columns] @ inputs[np.ix_(columns, stay)]) @ np.linalg.inv(
    inputs[np.ix_(stay, stay)]
  )
  return np.trace(gradients @ delta @ inputs @ delta.T), weight + delta


def greedy(weight, inputs, gradients, groups):
  """Costs by removing the cheapest group again and again, each time from the corrected weight."""
  costs, gone, floor = np.zeros(len(groups)), [], 0.0
  while len(gone) < len(groups):
    left = [i for i in range(len(groups)) if i not in gone]
    before = np.concatenate([groups[i] for i in gone]).astype(int) if gone else np.zeros(0, int)
    trials = {}
    for i in left:
      columns = np.concatenate([before, groups[i]])
      trials[i] = removal_cost(weight, inputs, gradients, columns)[0]
    spent = removal_cost(weight, inputs, gradients, before)[0] if gone else 0.0
    best = min(left, key=lambda i: trials[i])
    floor = max(floor, trials[best] - spent)
    costs[best] = floor
    gone.append(best)
  return costs


@pytest.mark.parametrize('of', ['channels', 'groups'])
def test_costs_are_those_of_the_quadratic_problem(monkeypatch, of):
  monkeypatch.setattr(curvature, 'ROUNDS', C)  # one channel a round: no approximation left
  weight, inputs, gradients = problem()
  given = jnp.float32(weight if of == 'channels' else weight.reshape(D, 3, 2, 2))
  costs = curvature.channel_costs if of == 'channels' else curvature.group_costs
  ours = costs(given, jnp.float32(inputs), jnp.float32(gradients))
  matrices = damped(inputs, curvature.DAMPING_INPUTS), damped(gradients, curvature.DAMPING_GRADIENTS)
  groups = np.arange(C).reshape((C, 1) if of == 'channels' else (3, 4))
  np.testing.assert_allclose(ours, greedy(weight, *matrices, groups), rtol=1e-3)


@pytest.mark.parametrize('rounds', [1, 5, 32])
def test_any_number_of_rounds_ranks_every_channel(monkeypatch, rounds):
  """The first round is exact; what is gone already costs nothing and spoils nothing."""
  monkeypatch.setattr(curvature, 'ROUNDS', rounds)
  weight, inputs, gradients = problem(2)
  weight[:, 3], inputs[3], inputs[:, 3] = 0, 0, 0
  costs = np.asarray(curvature.channel_costs(*map(jnp.float32, (weight, inputs, gradients))))
  assert costs[3] == 0 and (np.delete(costs, 3) > 0).all() and np.isfinite(costs).all()


def test_massive_activations_do_not_protect_the_other_channels(monkeypatch):
  """Three channels that one token makes ten million times as large, as in a layer with an attention sink."""
  monkeypatch.setattr(curvature, 'ROUNDS', C)
  weight, inputs, _ = problem(4)
  massive, others = [1, 5, 6], np.delete(np.arange(C), [1, 5, 6])
  inputs[massive] = inputs[:, massive] = 0
  usual = np.asarray(curvature.channel_costs(jnp.float32(weight), jnp.float32(inputs), jnp.eye(D)))
  token = np.zeros(C)
  token[massive] = np.array([3, 1, 2]) * np.sqrt(1e7 * np.median(np.diagonal(inputs)))
  inputs += np.outer(token, token)
  costs = np.asarray(curvature.channel_costs(jnp.float32(weight), jnp.float32(inputs), jnp.eye(D)))
  assert costs.argmax() in massive
  np.testing.assert_allclose(costs[others], usual[others], rtol=0.3)


def test_moments_are_those_of_the_whole_models_gradient():
  """Inputs and output gradients of o_proj and down_proj, against autograd on the model as a whole.

  The gradients are to ids drawn from the model, the loss that is told is that of the tokens.
  """
  shapes = (LayerShape(4, 2, 16),) * 2
  config = ModelConfig('llama', 61, 16, 4, shapes, RopeConfig(1e4), 1e-5, False)
  params = new_params(config)
  tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, 61)
  stacked = stacked_params(params, PrunePlan.dense(config))
  scores = [jax.jit(Scorer(config, 'curvature', micro_batch=b))(stacked, tokens) for b in (1, 4)]
  np.testing.assert_allclose(scores[0].ffn, scores[1].ffn, rtol=1e-3)
  np.testing.assert_allclose(scores[0].kv, scores[1].kv, rtol=1e-3)

  log_p = jax.nn.log_softmax(jax.jit(lambda p: llama.apply(config, p, tokens))(params))
  below = jnp.cumsum(jnp.exp(log_p), -1)
  drawn = jnp.argmax(below > jax.random.uniform(jax.random.key(0), (4, 8, 1)), -1)
  assert (drawn[:, :-1] == tokens[:, 1:]).mean() < 0.5
  told = -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1).mean()
  np.testing.assert_allclose([scores[0].loss, scores[1].loss], told, rtol=1e-5)

  for layer in range(2):

    def loss(noise, layer=layer):
      """Mean loss with `noise` [2, B, T, D] added to both blocks' outputs, so its gradient is that there."""
      x, tables, inputs = params['embed'][tokens], llama.rope(config, 8).of(0), None
      for i, (shape, tree) in enumerate(zip(config.layers, params['layers'], strict=True)):
        x, o_inputs = llama.attend(config, shape, tree, x, tables)
        x += noise[0] * (i == layer)
        x, down_inputs = llama.feed(config, shape, tree, x)
        x += noise[1] * (i == layer)
        inputs = (o_inputs, down_inputs) if i == layer else inputs
      x = llama.rms_norm(x, params['norm'], config.rms_norm_eps)
      logits = jax.nn.log_softmax(x @ params['lm_head'].T)[:, :-1]
      return -jnp.take_along_axis(logits, drawn[:, :-1, None], -1).mean(), inputs

    gradients, inputs = jax.jit(jax.grad(loss, has_aux=True))(jnp.zeros((2, 4, 8, 16)))
    moments = [g.T @ g / 32 for g in 32 * gradients.reshape(2, -1, 16)]
    o, down = params['layers'][layer]['attention']['o'], params['layers'][layer]['mlp']['down']
    for found, costs, weight, x, g in (
      (scores[0].kv, curvature.group_costs, o, inputs[0], moments[0]),
      (scores[0].ffn, curvature.channel_costs, down, inputs[1], moments[1]),
    ):
      np.testing.assert_allclose(found[layer], jax.jit(costs)(weight, x.T @ x / 32, g), rtol=1e-3)


def products(lowered) -> list[str]:
  """The precision of each product of fp32 factors in a lowered program."""
  lines = [line for line in lowered.as_text().splitlines() if 'stablehlo.dot_general' in line]
  whole = [line for line in lines if re.search(r': \(tensor<[\dx]*xf32>, tensor<[\dx]*xf32>\)', line)]
  return ['HIGHEST' if 'precision = [HIGHEST, HIGHEST]' in line else line for line in whole]


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_the_algebra_is_in_fp32_on_accelerators(platform):
  """Their default rounds the factors of fp32 products to TF32 or bfloat16."""
  weight, inputs, gradients = (jnp.asarray(x, jnp.float32) for x in problem())

  def results(weight, inputs, gradients):
    costs = curvature.channel_costs(weight, inputs, gradients)
    groups = curvature.group_costs(weight.reshape(D, 3, 2, 2), inputs, gradients)
    return costs, groups, algebra.total(algebra.own_products(weight, weight))

  lowered = jax.jit(results).trace(weight, inputs, gradients).lower(lowering_platforms=(platform,))
  found = products(lowered)
  assert len(found) >= 8 and set(found) == {'HIGHEST'}


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_least_squares_are_in_fp32_on_accelerators(platform):
  shape = LayerShape(4, 2, 24)
  config = ModelConfig('llama', 50, 16, 4, (shape, shape), RopeConfig(1e4), 1e-5, True)
  plan = PrunePlan.dense(config)
  stacked = stacked_params(new_params(config), plan)
  # The model's own products are not in fp32.
  stacked = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stacked)
  program = Compensator(config, 'least_squares', 2, jnp.bfloat16)
  tokens = jnp.zeros((2, 8), jnp.int32)
  with backend.made_for('gpu'):
    traced = jax.jit(program).trace(stacked, surgery.padded_masks(plan), tokens)
    lowered = traced.lower(lowering_platforms=(platform,))
  found = products(lowered)
  assert len(found) >= 4 and set(found) == {'HIGHEST'}
  # Second moments of activations in bfloat16: exact products, summed in fp32.
  summed = r'dot_general.*: \(tensor<[\dx]*xbf16>, tensor<[\dx]*xbf16>\) -> tensor<[\dx]*xf32>'
  assert len(re.findall(summed, lowered.as_text())) >= 4


def test_second_moments_of_bfloat16_are_summed_in_fp32():
  x = jax.random.normal(jax.random.key(0), (4096, 24), jnp.bfloat16) + 1
  expected = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
  np.testing.assert_allclose(jax.jit(algebra.own_products)(x, x)[0], expected, rtol=1e-5)


@pytest.mark.parametrize('size,block', [(7, 16), (64, 16), (70, 16), (96, 96)])
def test_sweeping_inverts_block_by_block(size, block):
  """As precisely as the Cholesky factorisation, which all but TPUs use, for inputs of few tokens too."""
  rng = np.random.default_rng(size)
  inputs = rng.standard_normal((size // 2, size)) * np.exp(rng.standard_normal(size))
  matrix = np.asarray(algebra.damped(jnp.float32(inputs.T @ inputs), 0.1))
  right = rng.standard_normal((size, 5)).astype(np.float32)
  swept = jax.jit(algebra.swept_inverse, static_argnums=1)(matrix, block)
  exact = np.linalg.inv(matrix.astype(np.float64))
  error = np.abs(swept - exact).max() / np.abs(exact).max()
  assert error < 4 * np.abs(algebra.inverse(matrix) - exact).max() / np.abs(exact).max() + 1e-6
  np.testing.assert_allclose(swept, np.asarray(swept).T, atol=1e-6 * np.abs(exact).max())
  np.testing.assert_allclose(algebra.solve(matrix, right), exact @ right, rtol=2e-3, atol=1e-5)


def test_massive_activations_leave_a_matrix_that_fp32_inverts():
  """By either way: three channels that are massive at one token are nearly the same."""
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal((200, 64))
  inputs[0, :3] *= 1e5
  matrix = np.asarray(algebra.damped(jnp.float32(inputs.T @ inputs), 0.1))
  exact = np.linalg.inv(matrix.astype(np.float64))
  sizes = np.sqrt(np.diagonal(exact))
  for found in (algebra.inverse(matrix), jax.jit(algebra.swept_inverse, static_argnums=1)(matrix, 16)):
    np.testing.assert_allclose(found / np.outer(sizes, sizes), exact / np.outer(sizes, sizes), atol=5e-3)


def test_on_tpus_large_matrices_are_swept(monkeypatch):
  monkeypatch.setattr(algebra, '_BLOCK', 16)
  matrix = 2 * np.eye(40, dtype=np.float32) + 0.5
  right = np.ones((40, 3), np.float32)

  def both(matrix, right):
    return algebra.inverse(matrix), algebra.solve(matrix, right)

  expected = jax.jit(both)(matrix, right)
  with backend.made_for('tpu'):
    lowered = jax.jit(lambda *args: both(*args)).lower(matrix, right)
  assert lowered.as_text().count('stablehlo.while') == 2  # one for each
  for found, there in zip(lowered.compile()(matrix, right), expected, strict=True):
    np.testing.assert_allclose(found, there, rtol=1e-5, atol=1e-6)
