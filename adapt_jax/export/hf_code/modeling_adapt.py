"""LLaMA-like models whose layers differ in width, for transformers 4.57 and 5.

These are the stock classes with other shapes and, with `output_bias`, two additional biases. No `forward`
is overridden, so the features of the installed version (caches, attention kernels, generation) are available.
Only a model sliced by SliceGPT has its own layers, around the stock attention and MLP.
"""

import re

import torch
import transformers
from torch import nn

from .configuration_adapt import configuration_class


def build_layers(model, config):
  """Replaces the decoder's layers, which the stock class built uniformly, by layers with their own widths."""
  layers = []
  for index, stock in enumerate(model.layers):
    kind = type(stock)
    if config.sliced_from:
      kind = type(f'Sliced{kind.__name__}', (SlicedLayer, kind), {})
    layer = kind(config.layer_config(index), index)
    for module in layer.modules():
      if hasattr(module, 'config'):
        # The attention implementation is read from here at every call, and may be changed later.
        module.config = config
    if hasattr(layer.self_attn, 'qkv_proj'):  # it reads its number of heads at every call
      layer.self_attn.config = LayerView(config, config.layer_config(index).num_attention_heads)
    if config.output_bias:
      add_bias(layer.self_attn.o_proj)
      add_bias(layer.mlp.down_proj)
    layers.append(layer)
  model.layers = nn.ModuleList(layers)
  if config.sliced_from:
    # A device map keeps a layer whole by this name.
    model._no_split_modules = [type(layers[0]).__name__]
    model.norm = SlicedNorm(config, rotated=config.tie_word_embeddings)


class LayerView:
  """A layer's configuration: its own number of heads, and all else from `whole`, that of the model."""

  def __init__(self, whole, num_attention_heads):
    self.whole, self.num_attention_heads = whole, num_attention_heads

  def __getattr__(self, name):
    if name == 'whole':  # not set yet, in a copy
      raise AttributeError(name)
    return getattr(self.whole, name)


class SlicedNorm(nn.Module):
  """RMS norm without gains, over the stream's width before slicing; with `rotated`, a matrix follows."""

  def __init__(self, config, rotated=False):
    super().__init__()
    self.width, self.eps = config.sliced_from, config.rms_norm_eps
    self.rotation = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if rotated else None

  def forward(self, x):
    wide = x.to(torch.float32)
    scale = torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / self.width + self.eps)
    normed = (wide * scale).to(x.dtype)
    return normed if self.rotation is None else self.rotation(normed)


class SlicedLayer:
  """Mixin of a decoder layer: both residual connections multiply the stream by a matrix."""

  def __init__(self, config, index):
    super().__init__(config, index)
    width = config.hidden_size
    self.input_layernorm, self.post_attention_layernorm = SlicedNorm(config), SlicedNorm(config)
    self.attention_shortcut = nn.Linear(width, width, bias=False)
    self.mlp_shortcut = nn.Linear(width, width, bias=False)

  def forward(self, hidden_states, **kwargs):
    attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    hidden_states = self.attention_shortcut(hidden_states) + attended
    return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


def add_bias(linear):
  """Adds a bias to a linear layer for which the stock class has no option."""
  if linear.bias is None:
    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


class PerLayerModel:
  """Mixin of a decoder."""

  base_model_prefix = 'model'  # transformers 4.57 has none for Gemma 3

  def __init__(self, config):
    super().__init__(config)
    build_layers(self, config)
    self.post_init()


class PerLayerForCausalLM:
  """Mixin of a decoder with a language modelling head."""

  def __init__(self, config):
    super().__init__(config)
    build_layers(self.model, config)
    self._no_split_modules = self.model._no_split_modules
    self.post_init()


def __getattr__(name):
  """AdaptLlamaModel, AdaptLlamaForCausalLM and the like: the stock class of the same name, with our layers.

  transformers imports classes by name, and only the stock classes of this model need to exist there.
  """
  found = re.fullmatch(r'Adapt(\w+?)(Model|ForCausalLM)', name)
  if not found:
    raise AttributeError(name)
  mixin = PerLayerModel if found[2] == 'Model' else PerLayerForCausalLM
  stock = getattr(transformers, found[1] + found[2])
  config_class = configuration_class(f'Adapt{stock.config_class.__name__}')
  fields = {'config_class': config_class, '__module__': __name__}
  if found[1] == 'Gemma2':  # transformers 4.57 uses it there, without bounds on the attention's logits
    fields['_supports_sdpa'] = False
  globals()[name] = type(name, (mixin, stock), fields)
  return globals()[name]
