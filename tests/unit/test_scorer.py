"""Layer-wise scoring against autograd on the whole model, and its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import loop_options
from adapt_jax.pruning import surgery
from adapt_jax.pruning.criteria import DISTANCES, IMPORTANCES
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from tests.support.helpers import new_params, random_params, save_checkpoint, stacked_params, tiny_config
from tests.support.reference import ReferenceScorer


def make_config(group=3, kv=2, layers=3, hidden=32, ffn=24):
  shapes = (LayerShape(kv * group, kv, ffn),) * layers
  return ModelConfig('llama', 97, hidden, 8, shapes, RopeConfig(1e4), 1e-5, False)


def make_model(**fields):
  config = make_config(**fields)
  return config, new_params(config)


def mean_loss(config, params, tokens):
  logits = jax.nn.log_softmax(llama.apply(config, params, tokens)[:, :-1])
  return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()


@pytest.mark.parametrize('name', sorted(DISTANCES))
def test_distances_are_means_over_all_tokens(name):
  config, params = make_model()
  tokens = jax.random.randint(jax.random.key(2), (4, 16), 0, 97)
  stacked = stacked_params(params, PrunePlan.dense(config))
  scores = jax.jit(Scorer(config, distance=name, micro_batch=2))(stacked, tokens)
  x = params['embed'][tokens]
  for i, (shape, layer) in enumerate(zip(config.layers, params['layers'], strict=True)):
    y = jax.jit(llama.apply_layer, static_argnums=(0, 1))(
      config, shape, layer, x, llama.rope(config, 16).of(0)
    )
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    expected = {
      'cosine': -(a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1),
      'euclidean': np.linalg.norm(a - b, axis=-1),
      'manhattan': np.abs(a - b).sum(-1),
    }[name].mean()
    np.testing.assert_allclose(scores.distance[i], expected, rtol=1e-5)
    x = y


def temporary_bytes(layers, rows=4, length=8, importance='taylor', dtype='float32', ffn=2048, options=None):
  """What the compiler plans beside arguments and results."""
  config = make_config(kv=4, layers=layers, hidden=128, ffn=ffn)
  params = llama.abstract_params(config)
  stacked = jax.eval_shape(lambda p: surgery.stack(p, PrunePlan.dense(config), dtype), params)
  scorer = Scorer(config, importance, micro_batch=2, dtype=jnp.dtype(dtype))
  lowered = jax.jit(scorer).lower(stacked, jax.ShapeDtypeStruct((rows, length), jnp.int32))
  return lowered.compile(options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_scoring_holds_one_layers_gradient_not_all(dtype):
  """Temporary bytes planned by the compiler grow with depth by the layers' inputs only."""
  few, many = (temporary_bytes(layers, dtype=dtype, options=loop_options()) for layers in (4, 12))
  layer_gradient, layer_inputs = 4 * 3 * 128 * 2048, 4 * 4 * 8 * 128
  assert (many - few) / 8 < 2 * layer_inputs + 0.1 * layer_gradient


def test_curvature_holds_the_moments_of_one_layer():
  """A few [F, F] matrices, however many layers there are."""
  few, many = (temporary_bytes(layers, importance='curvature') for layers in (2, 8))
  assert many < 6 * 4 * 2048**2
  assert many - few < 0.1 * 6 * 4 * 3 * 128 * 2048  # of six layers' weights in the MLP


def test_many_rows_take_no_more_memory_than_the_moments_of_all_layers_and_their_own_activations():
  """Twice the moments of [F, F], whatever the rows; all layers' inputs would be eight times as much."""
  few, many = (temporary_bytes(8, rows, 64, 'curvature', ffn=256) for rows in (16, 256))
  inputs = 8 * 240 * 64 * 128 * 4  # of all layers, of the rows that are more
  assert many - few < inputs / 4


@functools.cache
def model_and_gradients():
  """A tiny model, its stacked parameters, tokens, and each sample's own gradient of its own mean loss."""
  config, params = make_model()
  tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 97)
  gradient = jax.jit(jax.grad(lambda p, t: mean_loss(config, p, t)))
  samples = [jax.tree.map(np.asarray, gradient(params, t[None])['layers']) for t in tokens]
  stacked = stacked_params(params, PrunePlan.dense(config))
  return config, jax.tree.map(np.asarray, params['layers']), stacked, tokens, samples


def scores_and_gradients(importance, scorer=Scorer):
  """Scores of that model, its layers, and the gradients."""
  config, layers, stacked, tokens, samples = model_and_gradients()
  return jax.jit(scorer(config, importance=importance, micro_batch=2))(stacked, tokens), layers, samples


def member(layer, name):
  """A member weight of the MLP with its channels first and the hidden axis second."""
  return layer['mlp'][name].T if name == 'down' else layer['mlp'][name]


INPUT_STATISTICS = {'fluctuation', 'wanda'}


@pytest.mark.parametrize(
  'importance', sorted(IMPORTANCES.keys() - {'random', 'curvature'} - INPUT_STATISTICS)
)
def test_every_importance_is_its_formula(importance):
  scores, layers, samples = scores_and_gradients(importance)
  for i, layer in enumerate(layers):
    expected = 0.0
    for name in ('gate', 'up', 'down'):
      w = member(layer, name)
      each = np.stack([member(s[i], name) for s in samples])
      g, fisher = each.mean(0), np.square(each).mean(0)
      weight = {
        'taylor': w * g,
        'taylor_vectorize': (w * g).sum(1, keepdims=True),
        'taylor_second': w**2 * fisher,
        'taylor_mix': w * g - 0.5 * w**2 * fisher,
        'l1': w,
        'l2': w**2,
      }[importance]
      expected = expected + np.abs(weight).sum(1)
    np.testing.assert_allclose(scores.ffn[i], expected, rtol=1e-4)


@pytest.mark.parametrize('importance', ['taylor', 'taylor_vectorize'])
def test_query_heads_are_credited_to_their_group_or_as_the_reference_does(importance):
  """h // G is right; the reference's view(G, K·H).sum(0) means h mod K."""
  right, layers, samples = scores_and_gradients(importance)
  wrong, _, _ = scores_and_gradients(importance, ReferenceScorer)
  K, G, H = 2, 3, 8

  def rows(x):  # sums over the hidden axis of |·|, or |sum|
    return np.abs(x.sum(-1)) if importance == 'taylor_vectorize' else np.abs(x).sum(-1)

  for i, layer in enumerate(layers):

    def signed(name, i=i, layer=layer):
      return layer['attention'][name] * np.mean([s[i]['attention'][name] for s in samples], 0)

    query = rows(signed('q')) + rows(np.moveaxis(signed('o'), 0, -1))  # [K, G, H]
    kv = (rows(signed('k')) + rows(signed('v'))).sum(-1)  # [K]
    np.testing.assert_allclose(right.kv[i], kv + query.sum((1, 2)), rtol=1e-4)
    folded = query.reshape(-1).reshape(G, K * H).sum(0).reshape(K, H).sum(1)
    np.testing.assert_allclose(wrong.kv[i], kv + folded, rtol=1e-4)


def test_curvature_of_rows_in_parts_is_that_of_all_at_once(monkeypatch):
  config, params = make_model(kv=2, layers=3, hidden=16, ffn=24)
  stacked = stacked_params(params, PrunePlan.dense(config))
  tokens = jax.random.randint(jax.random.key(2), (8, 10), 0, config.vocab_size)
  whole, parts = (
    jax.jit(Scorer(config, 'curvature', micro_batch=2))(stacked, tokens) for _ in in_parts(monkeypatch, 1, 4)
  )
  for name in ('kv', 'ffn', 'distance', 'loss'):
    np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-4)


def in_parts(monkeypatch, *counts):
  for count in counts:
    monkeypatch.setattr(Scorer, 'parts', lambda self, M, B, T, count=count: count)
    yield count


def module_inputs(directory, tokens):
  """{module name: [tokens, columns]} of what enters o_proj and down_proj in transformers, in float64."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  model = transformers.AutoModelForCausalLM.from_pretrained(directory).double().eval()
  found, weights = {}, {}
  for name, module in model.named_modules():
    if name.endswith(('o_proj', 'down_proj')):
      weights[name] = module.weight.detach().numpy()
      module.register_forward_hook(lambda m, args, out, n=name: found.update({n: args[0].detach().numpy()}))
  with torch.no_grad():
    model(torch.tensor(np.asarray(tokens)))
  return {n: x.reshape(-1, x.shape[-1]) for n, x in found.items()}, weights


@pytest.mark.parametrize('importance', sorted(INPUT_STATISTICS))
def test_input_statistics_are_those_of_transformers_modules(importance, tmp_path):
  """Over the whole calibration batch, whatever the micro-batch; sane where the mean dwarfs the variance."""
  config = tiny_config('qwen2', (LayerShape(6, 2, 40),) * 3, tie_embeddings=True)
  params = random_params(config)
  params['layers'][1]['attention']['v_bias'] += 300  # the mixed values of layer 1 are 300 ± 2
  save_checkpoint(tmp_path, config, params)
  tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, config.vocab_size)
  inputs, weights = module_inputs(tmp_path, tokens)
  stacked = stacked_params(params, PrunePlan.dense(config))
  scores = jax.jit(Scorer(config, importance, micro_batch=2))(stacked, tokens)
  for i in range(config.num_layers):
    metric = []
    for name in (f'model.layers.{i}.self_attn.o_proj', f'model.layers.{i}.mlp.down_proj'):
      x, w = inputs[name], weights[name]
      if importance == 'fluctuation':
        metric.append(x.var(0) * (w**2).sum(0))
      else:
        metric.append((np.abs(w) * np.linalg.norm(x, axis=0)).sum(0) / np.sqrt(len(x)))
    columns = metric[0].reshape(2, 3, 12)
    np.testing.assert_allclose(scores.o_columns[i], columns, rtol=1e-3)
    np.testing.assert_allclose(scores.kv[i], columns.sum((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(scores.ffn[i], metric[1], rtol=1e-3)
