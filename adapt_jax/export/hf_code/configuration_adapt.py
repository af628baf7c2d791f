"""Configurations of LLaMA-like models whose layers differ in width, for transformers 4.57 and 5.

The ordinary fields hold the widest layer's values; `per_layer_config` holds what differs:
{"5": {"num_attention_heads": 6, "num_key_value_heads": 2}, "7": {"intermediate_size": 1024}}.
Late releases of transformers 5 define that field themselves, though their stock classes do not build layers
from it yet; in earlier ones it is a plain dict. With
`output_bias`, o_proj and down_proj have biases regardless of the other fields. With `sliced_from`,
SliceGPT has sliced the residual stream from that width to `hidden_size`.
"""

import copy

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config


class PerLayerWidths:
  """Mixin: a configuration whose attention heads and MLP width may differ from layer to layer."""

  # transformers reads fields such as `config.num_attention_heads`; it gets the widest layer's values.
  allow_global_per_layer_attribute_access = True
  output_bias = False
  sliced_from = 0

  def __init__(self, rope_parameters=None, **fields):
    """For transformers 4, which knows only the older names; 5 generates its own initialiser."""
    if rope_parameters:
      scaling = dict(rope_parameters)
      fields['rope_theta'] = scaling.pop('rope_theta')
      fields['rope_scaling'] = None if scaling['rope_type'] == 'default' else scaling
    super().__init__(**fields)

  def validate(self):
    """Checks nothing: stock Llama requires that heads divide hidden_size; pruned heads need not."""

  def layer_config(self, index):
    """The configuration of layer `index`: a shallow copy with that layer's widths."""
    overrides = getattr(self, 'per_layer_config', None) or {}
    if not isinstance(overrides, dict):  # late transformers 5: a sequence of configurations
      return overrides[index]
    layer = copy.copy(self)
    for key, widths in overrides.items():
      if int(key) == index:
        for name, value in widths.items():
          setattr(layer, name, value)
    return layer


class AdaptLlamaConfig(PerLayerWidths, LlamaConfig):
  model_type = 'adapt_llama'


class AdaptMistralConfig(PerLayerWidths, MistralConfig):
  model_type = 'adapt_mistral'


class AdaptQwen2Config(PerLayerWidths, Qwen2Config):
  model_type = 'adapt_qwen2'


class AdaptQwen3Config(PerLayerWidths, Qwen3Config):
  model_type = 'adapt_qwen3'
