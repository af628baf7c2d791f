"""The recipes of configs/published.py and llama_8b_to_1_5b.py, walked through all stages by shape alone.

No weights: configs are parsed as `open_source` does it, scores are drawn, parameters are abstract.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.configs import llama_8b_to_1_5b, published, studies
from adapt_jax.models.config import channel_params, count_params
from adapt_jax.models.formats.hf_config import config_from_hf
from adapt_jax.models.network import llama
from adapt_jax.modes.compare import list_cells
from adapt_jax.pipeline import inputs
from adapt_jax.pipeline.schedule import stage_steps, stage_targets
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import budget, surgery
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import steps
from adapt_jax.pruning.scores import Scores


def mobilellm(hidden, layers, heads, kv_heads, ffn):
  return {
    'model_type': 'mobilellm', 'hidden_size': hidden, 'num_hidden_layers': layers,
    'num_attention_heads': heads, 'num_key_value_heads': kv_heads, 'intermediate_size': ffn,
    'head_dim': 64, 'vocab_size': 32000,
    'hidden_act': 'silu', 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-5, 'rope_theta': 10000.0,
    'rope_scaling': None, 'attention_bias': False, 'mlp_bias': False, 'layer_sharing': False,
    'share_embedding': True, 'tie_word_embeddings': False,
  }  # fmt: skip


def qwen2(hidden, layers, heads, ffn, position, theta, window, tie):
  return {
    'model_type': 'qwen2', 'hidden_size': hidden, 'num_hidden_layers': layers, 'num_attention_heads': heads,
    'num_key_value_heads': 2, 'intermediate_size': ffn, 'vocab_size': 151936, 'hidden_act': 'silu',
    'max_position_embeddings': position, 'rms_norm_eps': 1e-6, 'rope_theta': theta,
    'sliding_window': window, 'use_sliding_window': False, 'tie_word_embeddings': tie,
  }  # fmt: skip


LLAMA_8B = {
  'model_type': 'llama', 'hidden_size': 4096, 'num_hidden_layers': 32, 'num_attention_heads': 32,
  'num_key_value_heads': 8, 'intermediate_size': 14336, 'vocab_size': 128256, 'hidden_act': 'silu',
  'max_position_embeddings': 131072, 'rms_norm_eps': 1e-5, 'rope_theta': 500000.0,
  'rope_scaling': {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  },
  'attention_bias': False, 'mlp_bias': False, 'tie_word_embeddings': False,
}  # fmt: skip

# What their config.json say, and how many parameters their model cards say are stored.
HF = {
  'facebook/MobileLLM-350M': (mobilellm(960, 32, 15, 5, 2560), 345_355_200),
  'facebook/MobileLLM-600M': (mobilellm(1152, 40, 18, 6, 3072), 603_188_352),
  'facebook/MobileLLM-1B': (mobilellm(1280, 54, 20, 5, 3584), 1_005_461_760),
  'Qwen/Qwen2.5-0.5B': (qwen2(896, 24, 14, 4864, 32768, 1e6, 32768, True), 494_032_768),
  'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B': (
    qwen2(1536, 28, 12, 8960, 131072, 1e4, 4096, False),
    1_777_088_000,
  ),
  'meta-llama/Llama-3.1-8B': (LLAMA_8B, 8_030_261_248),
}


class Row(NamedTuple):
  """A row of the paper's table: millions of parameters before and after, stages, end of the learning rate."""

  source: str
  before: float
  after: float
  stages: int
  min_lr: float | None = None


# For MobileLLM-350M the authors' script has 376.1 to 143.1: it adds each model's own embedding once more,
# 32,000 x 960 and 32,000 x 576.
PAPER = {
  'mobilellm_350m_to_125m': Row('facebook/MobileLLM-350M', 376.1 - 30.72, 143.1 - 18.432, 20, 0.0),
  'mobilellm_600m_to_350m': Row('facebook/MobileLLM-600M', 603.2, 376.0, 9, 2e-6),
  'mobilellm_1b_to_600m': Row('facebook/MobileLLM-1B', 1005.5, 603.2, 10, 2e-6),
  'qwen_0.5b_to_350m': Row('Qwen/Qwen2.5-0.5B', 494.0, 376.1, 5, 2e-6),
  'deepseek_1.5b_to_1b': Row('deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B', 1777.1, 1005.5, 11, 2e-6),
  'llama_8b_20_percent': Row('meta-llama/Llama-3.1-8B', 8030.3, 0.8 * 8030.3, 1),
  'llama_8b_40_percent': Row('meta-llama/Llama-3.1-8B', 8030.3, 0.6 * 8030.3, 1),
  'llama_8b_60_percent': Row('meta-llama/Llama-3.1-8B', 8030.3, 0.4 * 8030.3, 1),
}
ALL = (*published.RUNS, 'llama_8b_to_1_5b')


def options_of(name):
  config = llama_8b_to_1_5b.get_config() if name == 'llama_8b_to_1_5b' else published.get_config(name)
  return from_dict(config.to_dict())


def model_of(options):
  raw, params = HF[options.model.source]
  config = config_from_hf(raw, options.model.source)
  assert count_params(config) == params
  return config


abstract_params = functools.cache(llama.abstract_params)


def draw_scores(config, step):
  """Scores as measured on SmolLM2: the first layer changes its input most, group scores span decades."""
  layers, shape = config.num_layers, config.layers[0]
  rng = np.random.default_rng(step)
  kv, ffn = (np.exp(3 * rng.standard_normal((layers, n))) for n in (shape.num_kv_heads, shape.ffn))
  distance = np.concatenate([[-0.02], rng.uniform(-0.98, -0.74, layers - 1)])
  return Scores(kv, ffn, distance, np.float32(3))


def walk(options, config):
  """The stages as `pipeline.stages` takes them: (target, plan, abstract parameters) at the end of each."""
  prune = options.prune
  method, state = METHODS[prune.method](config, prune), PruneState.start(config)
  params = abstract_params(config)
  for target in stage_targets(budget.params(config), prune.limit, prune.stages, prune.stage_targets):
    compacted = state.plan
    taken = steps(method, config, state, target, lambda now: draw_scores(config, now.step))
    for _, state in taken:
      assert state.step < 10 * prune.steps * prune.stages, 'the walk does not end'
    relative = state.plan.relative_to(compacted)  # raises if something came back
    params = jax.eval_shape(lambda p, relative=relative: surgery.compact(p, relative), params)
    yield target, state.plan, params


@pytest.mark.parametrize('name', ['mobilellm_350m_to_125m', 'llama_8b_to_1_5b'])
def test_all_stages_by_shape_alone(name):
  options = options_of(name)
  config, targets = model_of(options), []
  before, align = PrunePlan.dense(config), options.prune.align_ffn
  for target, plan, params in walk(options, config):
    assert target - align * channel_params(config) < plan.params(config) <= target
    for widths, earlier in ((plan.kv_widths, before.kv_widths), (plan.ffn_widths, before.ffn_widths)):
      assert (widths >= 1).all() and (widths <= earlier).all()
    assert ((plan.ffn_widths % align == 0) | (plan.ffn_widths == config.layers[0].ffn)).all()
    stored = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert stored == count_params(plan.pruned_config(config)) == plan.params(config)
    before = plan
    targets.append(target)
  assert len(targets) == options.prune.stages and targets == sorted(set(targets), reverse=True)
  assert targets[-1] == options.prune.target


@pytest.mark.parametrize('name', ALL)
def test_the_plan_is_accepted_and_every_stage_trains_its_share(name):
  options = options_of(name)
  inputs.check_run(options, model_of(options))
  count, ends = options.prune.stages, stage_steps(options.train, options.prune.stages)
  total = options.train.tokens // (options.train.batch * options.train.length)
  assert ends[-1] == total and options.train.tokens == total * options.train.batch * options.train.length
  shares = [stop - start for start, stop in itertools.pairwise([0, *ends])]
  for i, share in enumerate(shares, 1):
    assert abs(share - total * 2 * i / (count * (count + 1))) <= 1


@pytest.mark.parametrize('name', PAPER)
def test_published_settings_are_the_papers(name):
  row, options = PAPER[name], options_of(name)
  config, prune, t = model_of(options), options.prune, options.train
  targets = stage_targets(budget.params(config), prune.limit, prune.stages, prune.stage_targets)
  assert options.model.source == row.source
  assert count_params(config) / 1e6 == pytest.approx(row.before, abs=0.05)
  assert targets[-1] / 1e6 == pytest.approx(row.after, abs=0.05)
  linear = [row.before - (row.before - row.after) * k / row.stages for k in range(1, row.stages + 1)]
  assert [target / 1e6 for target in targets] == pytest.approx(linear, abs=0.05)
  assert (prune.method, prune.importance, prune.layer_distance) == ('adapt', 'taylor', 'cosine')
  assert (prune.amplitude, prune.steps, prune.align_ffn) == (0.02, 50, 1)
  assert prune.compensate == 'none'
  assert (prune.calibration.samples, prune.calibration.length) == (512, 64)
  assert 'SlimPajama' in prune.calibration.source[0] and prune.calibration.layout == 'documents'
  if row.min_lr is None:
    assert t.tokens == 0
    return
  assert (t.lr, t.min_lr, t.schedule, t.warmup) == (2e-5, row.min_lr, 'wsd', 0.05)
  assert (t.batch, t.length, t.clip, t.distill.alpha) == (128, 1024, 1.0, 0.0)
  assert (t.layout, options.data.chat_template) == ('padded', 'paper')
  # 7.71 million samples, a row each.
  assert t.tokens / t.length == pytest.approx(7.71e6, rel=1e-3) and t.tokens // (t.batch * t.length) == 60_269


@pytest.mark.parametrize('name', studies._GRIDS)
def test_every_study_is_a_grid_that_measures_held_out_text(name, tmp_path):
  options = from_dict(studies.get_config(name).to_dict())
  cells = list_cells(options, Workdir(str(tmp_path / 'out'), {}))
  assert len({run.cell.name for run in cells}) == len(cells) > 1
  more = {'speeches', 'code'} if name in ('own', 'rows') else set()
  if name in ('share', 'covering'):
    more = {'fiction', 'code', 'instructions', 'speeches', 'package'}
  assert set(options.evaluate.texts) == {'wiki', 'web', 'chat', *more}
  assert options.compare.recover == (name not in ('sizes', 'own', 'rows', 'share'))
  held_out = {path for source in options.evaluate.texts.values() for path in source}
  assert not held_out & {*options.train.source, *options.prune.calibration.source}
