"""What distinguishes each model family from Llama, in one place: an entry of `FAMILIES` for each.

A family is an architecture of Hugging Face. Its entry describes the layers, config.json and the
export formats; the defaults of `Family` are Llama's. All other modules read these fields.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class Number(NamedTuple):
  """A number of config.json."""

  name: str
  inverse_root: bool = False  # it stands for one over its square root
  is_cap: bool = False  # it may be null, which is 0 here


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """One architecture; the defaults are Llama's."""

  stock: str  # the class of transformers is {stock}ForCausalLM
  gguf: str  # llama.cpp's architecture if all layers are equally wide (`formats.gguf_architectures`)
  base: str = ''  # the stock classes are {base}Config and {base}Model; '' if that is `stock`
  aliases: tuple[str, ...] = ()  # other values of `model_type` for models that compute the same function

  # The layers.
  qkv_bias: str = 'never'  # 'always', or 'optional' by the field `attention_bias`: then o has one too
  qk_norm: bool = False  # queries and keys are normed, each head by itself
  joint_qk_norm: bool = False  # all heads together: groups cannot be pruned, which would change the mean
  pre_norm: bool = True  # the inputs of attention and MLP are normed
  post_norm: bool = False  # their outputs are
  norm_offset: float = 0.0  # added to the weights of all norms
  activation: str = 'silu'  # of the gate, or 'gelu_tanh'
  root_embedding: bool = False  # embeddings are multiplied by the root of hidden_size
  sliceable: bool = False  # SliceGPT supports the layers

  # config.json.
  numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)  # by their field of `ModelConfig`
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # transformers', unlike Llama's
  usual_theta: float = 10000.0  # the base frequency of rotary embeddings in a file that has none
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # written in addition
  # Which layers use `sliding_window`: 'all'; 'some' by `layer_types`, and without that field all but every
  # `sliding_window_pattern`th, if any; 'unsupported' if a file in which a layer uses it is refused.
  windows: str = 'unsupported'
  local_rope: bool = False  # layers with a window have their own base frequency
  unrotated: bool = False  # `no_rope_layers` lists the layers without rotary embeddings
  needs_bos: bool = False  # the model is only good at tokens that follow BOS: every row must begin with it

  # Tensors.
  mlp_norm: str = 'post_attention_layernorm'  # the name of the norm before the MLP
  fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # stored -> its parts

  # Exports.
  heads_divide: bool = False  # the stock class requires that the heads divide hidden_size
  padded_as: str = ''  # a family of the same function without that requirement
  gguf_varied: bool = False  # llama.cpp's deci, whose layers may differ in width, computes the family
  # What the stock model of MLX-LM does not support: 'head_dim' (other than hidden_size / heads) or 'biases';
  # '' if it supports all. None if there is no code for MLX-LM.
  mlx: str | None = None

  @property
  def base_name(self) -> str:
    """What precedes `Config` and `Model` in the names of the stock classes."""
    return self.base or self.stock


_GEMMA_DEFAULTS: dict[str, Any] = {
  'head_dim': 256,
  'tie_word_embeddings': True,
  'sliding_window': 4096,
  'query_pre_attn_scalar': 256,
}
_GEMMA_NUMBERS = {
  'attention_scale': Number('query_pre_attn_scalar', inverse_root=True),
  'logit_cap': Number('final_logit_softcapping', is_cap=True),
}
# What both Gemmas have.
_GEMMA: dict[str, Any] = {
  'qkv_bias': 'optional',
  'post_norm': True,
  'norm_offset': 1.0,
  'activation': 'gelu_tanh',
  'root_embedding': True,
  'windows': 'some',
  'needs_bos': True,
  'mlp_norm': 'pre_feedforward_layernorm',
  'heads_divide': True,
}
# The key is `model_type` in config.json, and `ModelConfig.family`.
FAMILIES = {
  # Also SmolLM2 and DeepSeek-R1 distillations.
  'llama': Family(
    'Llama',
    aliases=('mobilellm',),
    qkv_bias='optional',
    sliceable=True,
    heads_divide=True,
    padded_as='mistral',
    gguf='llama',
    gguf_varied=True,
    mlx='',
  ),
  'mistral': Family(
    'Mistral',
    sliceable=True,
    defaults={'sliding_window': 4096},
    windows='all',
    gguf='llama',
    gguf_varied=True,
    mlx='',
  ),
  # A Mistral with `layer_types`: some layers have a window.
  'ministral': Family(
    'Ministral',
    sliceable=True,
    defaults={'sliding_window': 4096},
    windows='some',
    gguf='llama',
    gguf_varied=True,
  ),
  'qwen2': Family(
    'Qwen2',
    qkv_bias='always',
    sliceable=True,
    defaults={'sliding_window': 4096},
    constants={'use_sliding_window': False},
    gguf='qwen2',
    gguf_varied=True,
    mlx='head_dim',
  ),
  'qwen3': Family(
    'Qwen3',
    qkv_bias='optional',
    qk_norm=True,
    sliceable=True,
    defaults={'head_dim': 128, 'sliding_window': 4096},
    constants={'use_sliding_window': False},
    gguf='qwen3',
    mlx='biases',
  ),
  # Some layers have no rotary embeddings.
  'smollm3': Family(
    'SmolLM3',
    gguf='smollm3',
    qkv_bias='optional',
    defaults={'tie_word_embeddings': True},
    usual_theta=2e6,
    constants={'use_sliding_window': False},
    unrotated=True,
  ),
  'phi3': Family(
    'Phi3',
    defaults={'rms_norm_eps': 1e-5},
    windows='all',
    fused={
      'self_attn.qkv_proj': ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'),
      'mlp.gate_up_proj': ('mlp.gate_proj', 'mlp.up_proj'),
    },
    gguf='llama',
    gguf_varied=True,
  ),
  'gemma3_text': Family(
    'Gemma3',
    gguf='gemma3',
    base='Gemma3Text',
    qk_norm=True,
    defaults={'sliding_window_pattern': 6, 'rope_local_base_freq': 1e4, **_GEMMA_DEFAULTS},
    usual_theta=1e6,
    numbers=_GEMMA_NUMBERS,
    local_rope=True,
    **_GEMMA,
  ),
  'gemma2': Family(
    'Gemma2',
    gguf='gemma2',
    numbers={**_GEMMA_NUMBERS, 'attention_cap': Number('attn_logit_softcapping', is_cap=True)},
    defaults={
      'sliding_window_pattern': 2,
      'attn_logit_softcapping': 50.0,
      'final_logit_softcapping': 30.0,
      **_GEMMA_DEFAULTS,
    },
    **_GEMMA,
  ),
  'olmo2': Family(
    'Olmo2',
    gguf='olmo2',
    qkv_bias='optional',
    qk_norm=True,
    joint_qk_norm=True,
    pre_norm=False,
    post_norm=True,
    defaults={'rms_norm_eps': 1e-5},
  ),
  'granite': Family(
    'Granite',
    gguf='granite',
    qkv_bias='optional',
    numbers={
      'embedding_scale': Number('embedding_multiplier'),
      'residual_scale': Number('residual_multiplier'),
      'attention_scale': Number('attention_multiplier'),
      'logit_divisor': Number('logits_scaling'),
    },
    defaults=dict.fromkeys(
      ('embedding_multiplier', 'residual_multiplier', 'attention_multiplier', 'logits_scaling'), 1.0
    ),
  ),
}
