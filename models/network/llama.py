"""The decoder as pure functions over a plain parameter pytree.

    {'embed': [V, D], 'layers': [layer, ...], 'norm': [D], 'lm_head': [V, D] unless tied}

with each layer as `models.network.layers.DecoderLayer` defines it:

    {'attention_norm': [D], 'mlp_norm': [D],
     'attention': {'q': [K, G, H, D], 'k': [K, H, D], 'v': [K, H, D], 'o': [D, K, G, H],
                   'q_bias', 'k_bias', 'v_bias' (Qwen2), 'q_norm', 'k_norm' (Qwen3)},
     'mlp': {'gate': [F, D], 'up': [F, D], 'down': [D, F]}}

and, with `ModelConfig.output_bias`, 'o_bias' [D] in attention and 'down_bias' [D] in mlp. Llama and
Qwen3 checkpoints with `attention_bias` have 'q_bias', 'k_bias', 'v_bias' and 'o_bias'.

Families that norm the outputs of the blocks have 'attention_post_norm' and 'mlp_post_norm' [D]; OLMo 2 has no
other norms in a layer. Its 'q_norm' [K·G·H] and 'k_norm' [K·H] are over all heads.

A model sliced by SliceGPT (`ModelConfig.sliced_from`) has no norm weights. Instead, each layer has
'attention_shortcut' and 'mlp_shortcut' [D, D], and a model with tied tables has 'head_rotation' [D, D].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.network.attention import soft_cap
from adapt_jax.models.network.layers import DecoderLayer, project, rms_norm, sliced_norm
from adapt_jax.models.network.matmul import PRODUCT, dot
from adapt_jax.models.network.positions import Positions, PositionTables
from adapt_jax.models.network.sharding import constrain, gather_no_earlier

Params = dict[str, Any]


def _init_layer(config: ModelConfig, shape: LayerShape, key: jax.Array) -> Params:
  x = jnp.zeros((1, 1, config.hidden_size))
  variables: Any = DecoderLayer(config, shape).init(key, x, rope(config, 1).of(0))
  return variables['params']


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Random fp32 parameters, normal with standard deviation 0.02: for tests and benchmarks."""
  keys = jax.random.split(key, config.num_layers + 2)
  table = (config.vocab_size, config.hidden_size)
  params: Params = {
    'embed': 0.02 * jax.random.normal(keys[0], table),
    'layers': [_init_layer(config, s, k) for s, k in zip(config.layers, keys[2:], strict=True)],
  }
  if not config.sliced_from:
    params['norm'] = jnp.full(config.hidden_size, 1 - config.norm_offset)
  elif config.tie_embeddings:
    params['head_rotation'] = jnp.eye(config.hidden_size)
  if not config.tie_embeddings:
    params['lm_head'] = 0.02 * jax.random.normal(keys[1], table)
  return params


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> Params:
  """Shapes of all parameters as `jax.ShapeDtypeStruct`, without allocating any."""
  kinds = tuple(dict.fromkeys(config.layers))  # tracing takes time, and most layers have the same shape
  shapes = jax.eval_shape(lambda: init_params(config.with_layers(kinds), jax.random.key(0)))
  layers = dict(zip(kinds, shapes['layers'], strict=True))
  shapes['layers'] = [layers[shape] for shape in config.layers]
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)


def rope(config: ModelConfig, length: int) -> PositionTables:
  """What the layers know of positions 0 … length-1."""
  return PositionTables(config, np.arange(length))


def head(params: Params) -> jax.Array:
  """Output projection [V, D]: `lm_head`, or the tied embedding."""
  head_VD: jax.Array = params[head_name(params)]
  return head_VD


def head_name(params: Params) -> str:
  """The leaf that is the output projection."""
  return 'lm_head' if 'lm_head' in params else 'embed'


def embed(config: ModelConfig, params: Params, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
  """Embeddings [B, T, D] of token ids [B, T]."""
  x_BTD = params['embed'][tokens_BT].astype(dtype)
  return constrain(x_BTD * config.embedding_scale if config.embedding_scale != 1 else x_BTD, 'B..')


def hidden_states(
  config: ModelConfig,
  params: Params,
  tokens_BT: jax.Array,
  *,
  segments: jax.Array | None = None,
  dtype: Any = jnp.float32,
  remat: bool = False,
) -> jax.Array:
  """Final normed hidden states [B, T, D] in `dtype`, the dtype of all activations.

  With `segments` [B, T], tokens attend only to tokens with the same id.
  The backward pass keeps the results of products with weights and recomputes the rest of a layer; with
  `remat`, it recomputes the whole layer.
  """
  # Positions continue across segments: rotary attention depends only on their differences.
  tables = rope(config, tokens_BT.shape[1])

  policy = None if remat else jax.checkpoint_policies.save_only_these_names(PRODUCT)

  def run(i: int, layer: Params, x_BTD: jax.Array) -> jax.Array:
    def of_layer(layer: Params, x_BTD: jax.Array) -> jax.Array:
      return apply_layer(config, config.layers[i], layer, x_BTD, tables.of(i), segments=segments)

    return jax.checkpoint(of_layer, policy=policy)(layer, x_BTD)

  return through_layers(config, params, embed(config, params, tokens_BT, dtype), run)


def through_layers(
  config: ModelConfig,
  params: Params,
  x_BTD: jax.Array,
  run: Callable[[int, Params, jax.Array], jax.Array],
) -> jax.Array:
  """Final normed hidden states of embeddings x [B, T, D]; `run(i, layer, x)` applies layer i."""
  layers = list(params['layers'])
  for i in range(config.num_layers):
    if i + 1 < len(layers):  # gather one layer ahead, while this one computes
      layers[i + 1], x_BTD = gather_no_earlier(layers[i + 1], x_BTD)
    x_BTD = run(i, layers[i], x_BTD)
  return final_norm(config, params, x_BTD)


def final_norm(config: ModelConfig, params: Params, x_BTD: jax.Array) -> jax.Array:
  """The final hidden states, whose products with the head are the logits, from the last layer's output."""
  if not config.sliced_from:
    normed_BTD = rms_norm(x_BTD, params['norm'], config.rms_norm_eps, config.norm_offset)
    return normed_BTD / config.logit_divisor if config.logit_divisor != 1 else normed_BTD
  normed_BTD = sliced_norm(x_BTD, config.sliced_from, config.rms_norm_eps)
  if 'head_rotation' not in params:
    return normed_BTD
  D = config.hidden_size
  return project(normed_BTD.reshape(-1, D), params['head_rotation'], D).reshape(x_BTD.shape)


def apply_layer(
  config: ModelConfig,
  shape: LayerShape,
  layer: Params,
  x_BTD: jax.Array,
  positions: Positions,
  *,
  segments: jax.Array | None = None,
) -> jax.Array:
  """One decoder layer on x [B, T, D], as a pure function of its parameters."""
  y_BTD: Any = DecoderLayer(config, shape).apply({'params': layer}, x_BTD, positions, segments)
  return y_BTD


def attend(
  config: ModelConfig,
  shape: LayerShape,
  layer: Params,
  x_BTD: jax.Array,
  positions: Positions,
) -> tuple[jax.Array, jax.Array]:
  """The stream after the first half of a layer, and the input of o_proj, [B·T, K·G·H]."""
  out_BTD, inputs_TC = output('attention', config, shape, layer, x_BTD, positions)
  return add('attention', config, shape, layer, x_BTD, out_BTD), inputs_TC


def feed(
  config: ModelConfig, shape: LayerShape, layer: Params, x_BTD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The stream after the second half of a layer, and the input of down_proj, [B·T, F]."""
  out_BTD, inputs_TF = output('mlp', config, shape, layer, x_BTD)
  return add('mlp', config, shape, layer, x_BTD, out_BTD), inputs_TF


def output(
  block: str, config: ModelConfig, shape: LayerShape, layer: Params, x_BTD: jax.Array, *positions: Positions
) -> tuple[jax.Array, jax.Array]:
  """The output [B, T, D] of a block's last projection, o_proj or down_proj, and that projection's input.

  block: 'attention', which needs the layer's positions, or 'mlp'.
  """
  module: Any = DecoderLayer(config, shape)
  variables = {'params': layer}
  out_BTD, collected = module.apply(
    variables, block, x_BTD, *positions, method='output', mutable=['intermediates']
  )
  return out_BTD, collected['intermediates'][block]['inputs'][0]


def add(
  block: str, config: ModelConfig, shape: LayerShape, layer: Params, x_BTD: jax.Array, out_BTD: jax.Array
) -> jax.Array:
  """The stream after a block, from the stream x before it and what `output` gives."""
  module: Any = DecoderLayer(config, shape)
  y_BTD: jax.Array = module.apply({'params': layer}, block, x_BTD, out_BTD, method='add')
  return y_BTD


def apply(
  config: ModelConfig, params: Params, tokens_BT: jax.Array, *, dtype: Any = jnp.float32
) -> jax.Array:
  """Logits [B, T, V] in fp32 for token ids [B, T]."""
  return logits(config, params, hidden_states(config, params, tokens_BT, dtype=dtype))


def logits(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
  """Logits [..., V] in fp32 of final hidden states [..., D]."""
  logits_TV = soft_cap(head_logits(head(params), x.reshape(-1, x.shape[-1])), config.logit_cap)
  return logits_TV.reshape(*x.shape[:-1], -1)


def head_logits(head_VD: jax.Array, x_TD: jax.Array) -> jax.Array:
  """Logits [T, V] in fp32 of final hidden states, before `logit_cap`; the head is cast to their dtype."""
  return dot(x_TD, head_VD.astype(x_TD.dtype), 1)
