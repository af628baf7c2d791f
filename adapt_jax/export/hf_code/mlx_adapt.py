"""LLaMA-like models whose layers differ in width, for MLX-LM: stock layers, each with its own widths.

Tested with MLX-LM 0.32, which loads the file named by `model_file` in config.json if remote code is trusted.
"""

import mlx.core as mx
from mlx_lm.models import llama, qwen3


class ModelArgs(dict):
  """The fields of config.json."""

  @classmethod
  def from_dict(cls, config):
    return cls(config)


def Model(config):
  """The stock model with per-layer widths and biases."""
  stock = qwen3 if config['model_type'].endswith('qwen3') else llama  # Mistral and Qwen2 use Llama's code
  rope = {'rope_theta': config.get('rope_theta')}  # saved by transformers 4; 5 uses only the new name
  rope |= config.get('rope_parameters') or config.get('rope_scaling') or {}
  fields = {
    **config,
    'rope_theta': rope['rope_theta'],
    'rope_scaling': None if rope.get('rope_type', 'default') == 'default' else rope,
    'tie_word_embeddings': config.get('tie_word_embeddings', False),
    'attention_bias': False,  # biases are added below
  }
  model = stock.Model(stock.ModelArgs.from_dict(fields))
  widths = {int(layer): value for layer, value in config.get('per_layer_config', {}).items()}
  for i in range(len(model.layers)):
    layer = stock.TransformerBlock(stock.ModelArgs.from_dict(fields | widths.get(i, {})))
    for linear in biased(layer, config):
      linear.bias = mx.zeros(linear.weight.shape[0])
    model.layers[i] = layer
  return model


def biased(layer, config):
  """The layer's projections that have biases."""
  attention = layer.self_attn
  everywhere, output = config.get('attention_bias', False), config.get('output_bias', False)
  found = []
  if everywhere or config['model_type'].endswith('qwen2'):
    found += [attention.q_proj, attention.k_proj, attention.v_proj]
  if everywhere or output:
    found.append(attention.o_proj)
  if output:
    found.append(layer.mlp.down_proj)
  return found
