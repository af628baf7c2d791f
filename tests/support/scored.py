"""Models whose layers are alike, random scores of their groups, and the steps of a method on these."""

import numpy as np

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.pruning.attention_units import KV_GROUPS, AttentionUnit
from adapt_jax.pruning.methods.base import Method
from adapt_jax.pruning.plan import PruneState
from adapt_jax.pruning.scores import Scores

KV, G, HEAD, FFN, HIDDEN = 3, 2, 8, 52, 32


def make_config(layers=8, tie=True, kv=KV, ffn=FFN, **fields) -> ModelConfig:
  shapes = (LayerShape(kv * G, kv, ffn),) * layers
  return ModelConfig('llama', 101, HIDDEN, HEAD, shapes, RopeConfig(1e4), 1e-5, tie, **fields)


def random_scores(config: ModelConfig, seed: int = 0, unit: AttentionUnit = KV_GROUPS) -> Scores:
  """Layers differ in scale, as real ones do."""
  rng = np.random.default_rng(seed)
  scale, shape = np.exp(rng.normal(size=(config.num_layers, 1))), config.layers[0]
  sizes = (shape.num_kv_heads, G) if unit is KV_GROUPS else (G, shape.num_kv_heads)
  columns = rng.random((config.num_layers, *sizes, HEAD)) * scale[:, :, None, None]
  ffn, distance = rng.random((config.num_layers, shape.ffn)) * scale, rng.uniform(-1, -0.3, config.num_layers)
  return Scores(columns.sum((2, 3)), ffn, distance, np.float32(1), columns)


def run(
  method: Method, config: ModelConfig, state: PruneState, target: int, unit: AttentionUnit = KV_GROUPS
) -> list[PruneState]:
  """Steps on random scores until the target is reached; returns the states."""
  states = [state]
  while states[-1].plan.cost(method.budget) > target:
    assert len(states) < 1000, 'the steps do not end'
    states.append(method.step(random_scores(config, len(states), unit), states[-1], target))
  return states
