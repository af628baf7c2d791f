"""Configurations of LLaMA-like models whose layers differ in width, for transformers 4.57 and 5.

The ordinary fields hold the widest layer's values; `per_layer_config` holds what differs:
{"5": {"num_attention_heads": 6, "num_key_value_heads": 2}, "7": {"intermediate_size": 1024}}.
Late releases of transformers 5 define that field themselves, though their stock classes do not build layers
from it yet; in earlier ones it is a plain dict. With
`output_bias`, o_proj and down_proj have biases regardless of the other fields. With `sliced_from`,
SliceGPT has sliced the residual stream from that width to `hidden_size`.
"""

import copy
import re

import transformers


class PerLayerWidths:
  """Mixin: a configuration whose attention heads and MLP width may differ from layer to layer."""

  # transformers reads fields such as `config.num_attention_heads`; it gets the widest layer's values.
  allow_global_per_layer_attribute_access = True
  output_bias = False
  sliced_from = 0

  def __init__(self, rope_parameters=None, **fields):
    """For transformers 4, which knows only the older names; 5 generates its own initialiser."""
    if rope_parameters:
      # Gemma 3 has a rotary embedding for each type of layer.
      scaling = dict(rope_parameters.get('full_attention', rope_parameters))
      if 'sliding_attention' in rope_parameters:
        fields['rope_local_base_freq'] = rope_parameters['sliding_attention']['rope_theta']
      fields['rope_theta'] = scaling.pop('rope_theta')
      fields['rope_scaling'] = None if scaling['rope_type'] == 'default' else scaling
    super().__init__(**fields)

  @classmethod
  def get_config_dict(cls, *args, **options):
    """config.json, whose model_type may be the stock one, so that tokenizers load without this code."""
    fields, rest = super().get_config_dict(*args, **options)
    return fields | {'model_type': cls.model_type}, rest

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


def configuration_class(name):
  """AdaptLlamaConfig and the like: the stock class of the same name, with widths for each layer."""
  if name in globals():
    return globals()[name]
  found = re.fullmatch(r'Adapt(\w+)Config', name)
  if not found:
    raise AttributeError(name)
  stock = getattr(transformers, f'{found[1]}Config')
  fields = {'model_type': f'adapt_{stock.model_type}', '__module__': __name__}
  globals()[name] = type(name, (PerLayerWidths, stock), fields)
  return globals()[name]


__getattr__ = configuration_class  # of this module: transformers imports classes by name
