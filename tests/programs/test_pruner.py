"""The progressive loop: landing, fresh draws, and what the memo saves."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.prune_options import CalibrationOptions, PruneOptions
from adapt_jax.data.windows import Blocks
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, channel_params, count_params
from adapt_jax.pipeline.schedule import target_cost
from adapt_jax.pruning import budget, surgery
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.pruning.score_memo import ScoreMemo
from tests.support.helpers import (
  KeepingCompiler,
  new_params,
  random_params,
  save_checkpoint,
  stacked_params,
  tiny_config,
)

OPTIONS = PruneOptions(
  method='adapt',
  steps=40,
  compensate='none',
  align_ffn=1,
  calibration=CalibrationOptions(samples=8, length=12, batch=4),
)


@pytest.fixture(scope='module')
def model():
  config = ModelConfig('llama', 61, 32, 8, (LayerShape(6, 3, 64),) * 3, RopeConfig(1e4), 1e-5, True)
  params = new_params(config)
  return config, params


def make_pruner(config, rows=32, seed=0, memo=None, compiler=None, dtype=jnp.float32, **kw):
  tokens = np.random.default_rng(1).integers(0, 61, (rows, 12)).astype(np.int32)
  blocks = Blocks(tokens, np.ones_like(tokens, bool), 0)
  options = dataclasses.replace(OPTIONS, **kw)
  return Pruner(config, options, blocks, seed=seed, compiler=compiler or Compiler(), dtype=dtype, memo=memo)


def prune(pruner, params, target, state=None, compacted=None):
  state = state or PruneState.start(pruner.config)
  compacted = compacted or state.plan
  stacked = pruner.stack(params, compacted)
  steps = list(pruner.prune(stacked, compacted, state, target, 'prune'))
  return (steps[-1][0] if steps else state), [record for _, record in steps]


def test_bfloat16_weights_are_gone_over_as_they_are():
  """Neither scoring nor compensation holds all layers in fp32 beside, which takes twice their bytes."""
  config = ModelConfig('llama', 61, 64, 16, (LayerShape(4, 2, 256),) * 8, RopeConfig(1e4), 1e-5, True)
  params = new_params(config)
  compiler = KeepingCompiler()
  pruner = make_pruner(config, compensate='least_squares', compiler=compiler, dtype=jnp.bfloat16)
  plan = PrunePlan.dense(config)
  pruner.score(pruner.stack(params, plan), 0)
  pruner.compensate(params, plan, dataclasses.replace(plan, ffn=(np.arange(256) > 9,) * 8), 0)
  weights = 2 * count_params(config)
  for name, program in compiler.made.items():
    planned = program.memory_analysis()
    assert planned.argument_size_in_bytes >= weights > planned.temp_size_in_bytes, name
  assert compiler.made.keys() == {'scoring', 'compensation'}


def test_a_draw_depends_on_seed_and_step_alone(model):
  """Stopping in between and going on from the saved state ends with the same plan."""
  config, params = model
  target = target_cost(budget.params(config), 0.7)
  pruner = make_pruner(config)
  whole, records = prune(pruner, params, target)
  assert target - channel_params(config) < records[-1].params == whole.plan.params(config) <= target
  assert len(records) > 3 and pruner._compiler.counts == {'scoring': 1}
  half, _ = prune(make_pruner(config), params, records[1].params)
  resumed = PruneState.from_json(half.to_json(), config)
  rest, _ = prune(make_pruner(config), params, target, resumed, PruneState.start(config).plan)
  assert half.sparsity.tolist() == records[1].sparsity  # it stopped on a whole step
  assert rest.plan.equals(whole.plan)
  other, _ = prune(make_pruner(config, seed=1), params, target)
  assert not other.plan.equals(whole.plan)


def test_wanda_sp_scores_a_layer_on_the_outputs_of_the_pruned_layers_before_it(tmp_path):
  """As transformers' modules do it, one layer after another, all on the same rows."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  config = tiny_config('qwen2', (LayerShape(9, 3, 64),) * 4, tie_embeddings=True, vocab_size=61)
  params = random_params(config)
  save_checkpoint(tmp_path, config, params)
  pruner = make_pruner(config, rows=16, method='wanda_sp')
  found, _ = prune(pruner, params, target_cost(budget.params(config), 0.5))
  assert (found.plan.kv_widths < 3).all() and (found.plan.ffn_widths < 64).all()

  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double().eval()
  tokens, inputs = pruner.blocks.tokens[pruner._draw(0)], {}
  for layer, kv, ffn in zip(model.model.layers, found.plan.kv, found.plan.ffn, strict=True):
    kept = (layer.self_attn.o_proj, np.repeat(kv, 3 * 12)), (layer.mlp.down_proj, ffn)
    for module, _ in kept:
      module.register_forward_hook(lambda m, args, out: inputs.update({m: args[0].detach().numpy()}))
    with torch.no_grad():
      model(torch.tensor(tokens))
    for module, mask in kept:
      x = inputs[module].reshape(-1, len(mask))
      metric = (np.abs(module.weight.detach().numpy()) * np.linalg.norm(x, axis=0)).sum(0)
      if module is layer.self_attn.o_proj:
        metric = np.repeat(metric.reshape(3, -1).sum(1), 3 * 12)
      assert metric[mask].min() > metric[~mask].max()
      module.weight.data[:, torch.tensor(~mask)] = 0


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'importance': 'random'},  # drawn by the seed, whatever the memo remembers of the pass
    {'importance': 'fluctuation'},
  ],
  ids=str,
)
def test_a_memo_saves_passes_and_changes_nothing(model, options):
  config, params = model
  target, memo = target_cost(budget.params(config), 0.8), ScoreMemo()
  whole, records = prune(make_pruner(config, **options), params, target)
  for passes in (len(records), 0):
    before = memo.computed
    found, again = prune(make_pruner(config, memo=memo, **options), params, target)
    assert found.plan.equals(whole.plan) and again == records
    assert memo.computed - before == passes
  other, _ = prune(make_pruner(config, seed=1, memo=memo, **options), params, target)
  assert other.plan.equals(prune(make_pruner(config, seed=1, **options), params, target)[0].plan)
  assert not other.plan.equals(whole.plan)  # other rows, and with random scores other draws


def test_a_memo_tells_the_same_tokens_in_other_rows_apart(model):
  config, params = model
  memo, tokens = ScoreMemo(), np.random.default_rng(1).integers(0, 61, (8, 16)).astype(np.int32)
  stacked = stacked_params(params, PrunePlan.dense(config))
  losses = []
  for rows in (tokens, tokens.reshape(16, 8)):
    samples = CalibrationOptions(samples=len(rows), length=rows.shape[1], batch=4)
    options = dataclasses.replace(OPTIONS, calibration=samples)
    blocks, common = Blocks(rows, np.ones_like(rows, bool), 0), {'compiler': Compiler(), 'dtype': jnp.float32}
    pruner = Pruner(config, options, blocks, seed=0, memo=memo, **common)
    losses.append(float(pruner.score(stacked, 0, PrunePlan.dense(config)).loss))
  assert memo.computed == 2 and losses[0] != losses[1]


def test_a_memo_is_only_for_the_models_own_weights(model):
  """After the first compaction training may have changed them: equal plans no longer mean equal scores."""
  config, params = model
  memo, target = ScoreMemo(), target_cost(budget.params(config), 0.8)
  state, _ = prune(make_pruner(config, memo=memo), params, target_cost(budget.params(config), 0.9))
  small, known = surgery.compact(params, state.plan), (memo.computed, memo.remembered)
  prune(make_pruner(config, memo=memo), small, target, state, state.plan)
  assert (memo.computed, memo.remembered) == known


def test_a_memo_computes_a_correction_once(model):
  config, params = model
  dense, memo = PrunePlan.dense(config), ScoreMemo()
  narrower = dataclasses.replace(dense, ffn=(np.arange(64) > 9,) * 3)
  other = dataclasses.replace(dense, ffn=(np.arange(64) > 19,) * 3)

  def compensate(plan, compacted=dense, params=params, memo=memo):
    compiler = Compiler()
    pruner = make_pruner(config, compensate='least_squares', memo=memo, compiler=compiler)
    return pruner.compensate(params, compacted, plan, 0), compiler.counts.get('compensation', 0)

  alone, _ = compensate(narrower, memo=None)
  for computed in (1, 0):
    found, counted = compensate(narrower)
    assert counted == computed
    chex.assert_trees_all_equal(found, alone)
  assert compensate(other)[1] == 1 and compensate(other)[1] == 0
  small = surgery.compact(params, narrower)  # which training may have changed
  assert compensate(other, narrower, small)[1] == 1
