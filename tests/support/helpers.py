"""Small models shared by the tests."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import LayerShape, Llama3Scaling, ModelConfig, RopeConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.formats.hf_config import config_to_hf
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.models.network import llama
from adapt_jax.pruning import surgery
from adapt_jax.pruning.attention_units import KV_GROUPS
from adapt_jax.pruning.plan import PrunePlan

# The first layer is narrow, the last one has most heads, the widest MLP is between: nothing that
# takes all layers for the first, the last or the widest one passes.
VARIED = (LayerShape(3, 1, 24), LayerShape(6, 2, 40), LayerShape(3, 1, 64), LayerShape(9, 3, 48))
UNIFORM = (LayerShape(6, 2, 40),) * 2
# What tiny models have of the numbers that only some families have.
NUMBERS: dict[str, dict[str, Any]] = {
  'granite': {'embedding_scale': 1.5, 'residual_scale': 0.6, 'attention_scale': 0.4, 'logit_divisor': 2.0},
  'gemma3_text': {'embedding_scale': 48**0.5, 'attention_scale': 20**-0.5, 'local_rope': RopeConfig(10000.0)},
  'gemma2': {'embedding_scale': 48**0.5, 'attention_scale': 20**-0.5, 'attention_cap': 4.0, 'logit_cap': 9.0},
}


class KeepingCompiler(Compiler):
  """Hands out the programs that it made."""

  def __init__(self) -> None:
    super().__init__()
    self.made: dict[str, Any] = {}

  def __call__(self, name: str, *args: Any, **options: Any) -> Any:
    self.made[name] = super().__call__(name, *args, **options)
    return self.made[name]


# The kinds of their layers, in turn: a window of 5 tokens, or no rotary embeddings.
KINDS: dict[str, tuple[dict[str, Any], ...]] = {
  'smollm3': ({}, {'rotary': False}),
  'phi3': ({'window': 5},),
  'ministral': ({'window': 5}, {}),
  'gemma3_text': ({'window': 5}, {}),
  'gemma2': ({'window': 5}, {}),
}


def tiny_config(family: str = 'llama', layers: tuple[LayerShape, ...] = VARIED, **fields: Any) -> ModelConfig:
  """Hidden size 48, 64 ids; head_dim is not D / N. LLaMA scales its frequencies, two families tie."""
  scaling = Llama3Scaling(8.0, 1.0, 4.0, 32) if family == 'llama' else None
  defaults = {
    'vocab_size': 64,
    'hidden_size': 48,
    'head_dim': 12,
    'rope': RopeConfig(50000.0, scaling),
    'rms_norm_eps': 1e-5,
    'tie_embeddings': family in ('llama', 'qwen3', 'smollm3', 'gemma3_text'),
    'qkv_bias': family == 'qwen2',
    'qk_norm': FAMILIES[family].qk_norm,
    'max_position': 128,
    **NUMBERS.get(family, {}),
  }
  kinds = itertools.cycle(KINDS.get(family, ({},)))
  layers = tuple(dataclasses.replace(shape, **kind) for shape, kind in zip(layers, kinds, strict=False))
  if FAMILIES[family].joint_qk_norm:  # whose heads are never pruned
    layers = tuple(KV_GROUPS.narrowed(shape, 2, shape.ffn) for shape in layers)
  return ModelConfig(family=family, layers=layers, **(defaults | fields))


def random_params(config: ModelConfig, seed: int = 0, dtype: Any = np.float32) -> llama.Params:
  """Numpy parameters of a scale at which every one of them moves the logits, norms and biases too."""
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    centre = 1.0 - config.norm_offset if 'norm' in jax.tree_util.keystr(path) else 0.0
    return (centre + 0.25 * rng.standard_normal(leaf.shape)).astype(dtype)

  return jax.tree_util.tree_map_with_path(draw, llama.abstract_params(config))


def new_params(config: ModelConfig, seed: int = 0, scale: float = 3.0) -> llama.Params:
  """What `llama.init_params` has, times `scale`, by NumPy: JAX compiles it for seconds."""
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    name = jax.tree_util.keystr(path)
    if 'norm' in name:
      return jnp.full(leaf.shape, scale * (1 - config.norm_offset), np.float32)
    spread = 0.0 if 'bias' in name else 0.02 * scale
    return jnp.asarray(spread * rng.standard_normal(leaf.shape), np.float32)

  return jax.tree_util.tree_map_with_path(draw, llama.abstract_params(config))


def stacked_params(params: llama.Params, plan: PrunePlan) -> llama.Params:
  """`surgery.stack` in float32, compiled."""
  return jax.jit(lambda p: surgery.stack(p, plan, np.float32))(params)


def random_tokens(config: ModelConfig, rows: int = 2, length: int = 40, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length))


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: llama.Params, tokens_BT: jax.Array) -> jax.Array:
  """`models.network.llama.apply`, compiled: op by op it takes seconds."""
  return llama.apply(config, params, tokens_BT)


def save_checkpoint(
  directory: pathlib.Path, config: ModelConfig, params: llama.Params, **save: Any
) -> dict[str, Any]:
  """Writes a stock Hugging Face directory, and returns its config.json."""
  directory.mkdir(parents=True, exist_ok=True)
  save_params(config, params, directory, **save)
  raw = config_to_hf(config)
  (directory / 'config.json').write_text(json.dumps(raw))
  return raw


def randomise(model: Any, seed: int = 0) -> Any:
  """Draws a PyTorch model's parameters as `random_params` does."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  centre = 0.0 if 'Gemma' in type(model).__name__ else 1.0  # of the norms
  with torch.no_grad():
    for name, weight in model.named_parameters():
      weight.normal_(centre if 'norm' in name else 0.0, 0.25, generator=generator)
  return model.eval()


def factors(lowered: Any) -> list[list[str]]:
  """Of each product of a lowered program the dtypes of its two factors."""
  names = {'bf16': 'bfloat16', 'f32': 'float32'}
  lines = [line for line in lowered.as_text().splitlines() if 'stablehlo.dot_general' in line]
  kinds = [re.findall(r'tensor<(?:\d+x)*(\w+)>', line.split(' : ')[-1])[:2] for line in lines]
  return [[names[kind] for kind in two] for two in kinds]


def compiled_factors(function: Callable[..., Any], *arguments: Any) -> set[str]:
  """The dtypes of all factors of products in the compiled program."""
  found = set()
  for computation in jax.jit(function).lower(*arguments).compile().as_text().split('\n\n'):
    kinds = dict(re.findall(r'%?([\w.-]+) = (\w+)\[', computation))
    for pair in re.findall(r' dot\(%?([\w.-]+), %?([\w.-]+)\)', computation):
      found |= {kinds[name] for name in pair}
  return found


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
  """The one line of the InputError that the call raises."""
  with pytest.raises(InputError) as error:
    function(*arguments, **options)
  assert '\n' not in str(error.value)
  return str(error.value)
