"""LLaMA-like models whose layers differ in width, for transformers 4.57 and 5.

The stock classes with other shapes and, with `output_bias`, two biases more: no `forward` is
overridden, so whatever the installed version does (caches, attention kernels, generation) is done here too.
"""

from torch import nn
from transformers import (
  LlamaForCausalLM,
  LlamaModel,
  MistralForCausalLM,
  MistralModel,
  Qwen2ForCausalLM,
  Qwen2Model,
  Qwen3ForCausalLM,
  Qwen3Model,
)

from .configuration_adapt import (
  AdaptLlamaConfig,
  AdaptMistralConfig,
  AdaptQwen2Config,
  AdaptQwen3Config,
)


def build_layers(model, config):
  """Replaces the decoder's layers, which the stock class built alike, by layers of their own widths."""
  layers = []
  for index, stock in enumerate(model.layers):
    layer = type(stock)(config.layer_config(index), index)
    for module in layer.modules():
      if hasattr(module, 'config'):
        # The attention implementation is read from here at every call, and may be changed later.
        module.config = config
    if config.output_bias:
      add_bias(layer.self_attn.o_proj)
      add_bias(layer.mlp.down_proj)
    layers.append(layer)
  model.layers = nn.ModuleList(layers)


def add_bias(linear):
  """Gives a linear layer the bias that its stock class has no option for."""
  if linear.bias is None:
    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


class PerLayerModel:
  """Mixin of the four decoders."""

  def __init__(self, config):
    super().__init__(config)
    build_layers(self, config)
    self.post_init()


class PerLayerForCausalLM:
  """Mixin of the four decoders with a language modelling head."""

  def __init__(self, config):
    super().__init__(config)
    build_layers(self.model, config)
    self.post_init()


class AdaptLlamaModel(PerLayerModel, LlamaModel):
  config_class = AdaptLlamaConfig


class AdaptLlamaForCausalLM(PerLayerForCausalLM, LlamaForCausalLM):
  config_class = AdaptLlamaConfig


class AdaptMistralModel(PerLayerModel, MistralModel):
  config_class = AdaptMistralConfig


class AdaptMistralForCausalLM(PerLayerForCausalLM, MistralForCausalLM):
  config_class = AdaptMistralConfig


class AdaptQwen2Model(PerLayerModel, Qwen2Model):
  config_class = AdaptQwen2Config


class AdaptQwen2ForCausalLM(PerLayerForCausalLM, Qwen2ForCausalLM):
  config_class = AdaptQwen2Config


class AdaptQwen3Model(PerLayerModel, Qwen3Model):
  config_class = AdaptQwen3Config


class AdaptQwen3ForCausalLM(PerLayerForCausalLM, Qwen3ForCausalLM):
  config_class = AdaptQwen3Config
