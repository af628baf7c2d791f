"""What distinguishes each model family from Llama, in one place: an entry of `FAMILIES` for each.

A family is an architecture of Hugging Face. Its entry describes the layers, config.json and the
export formats; the defaults of `Family` are Llama's. All other modules read these fields.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class Number(NamedTuple):
  """A number of config.json: its name there, whether it stands for one over its square root, and for a cap.

  A cap may be null, which is 0 here.
  """

  name: str
  inverse_root: bool = False
  is_cap: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """One architecture.

  Names:
    stock: the class of transformers is {stock}ForCausalLM.
    base: those of the configuration and of the decoder without head are {base}Config and {base}Model; '' if
      that is `stock`.
    aliases: other values of `model_type` in config.json for models that compute the same function.

  The layers:
    qkv_bias: whether q, k and v have biases: 'never', 'always', or 'optional' by the field `attention_bias`;
      if optional, o has one too.
    qk_norm: whether queries and keys are normed, each head by itself or, with `joint_qk_norm`, all together.
      Groups of the latter cannot be pruned: the others are divided by a mean over all.
    pre_norm, post_norm: whether the inputs of attention and MLP are normed, and their outputs.
    norm_offset: is added to the weights of all norms.
    activation: of the gate, 'silu' or 'gelu_tanh'.
    root_embedding: whether embeddings are multiplied by the root of hidden_size.
    sliceable: whether SliceGPT supports the layers.

  config.json:
    numbers: fields of `ModelConfig` -> the numbers in config.json.
    defaults: transformers' values of fields that a file leaves out, where they are not Llama's.
    usual_theta: the base frequency of rotary embeddings in a file that has none.
    constants: fields that are written in addition, always with these values.
    windows: which layers use `sliding_window`: 'all'; 'some' by `layer_types`, and without that field all but
      every `sliding_window_pattern`th, if any; 'unsupported' if a file in which a layer uses it is refused.
    local_rope: whether layers with a window have their own base frequency.
    unrotated: whether `no_rope_layers` lists the layers without rotary embeddings.
    needs_bos: whether the model is only good at tokens that follow BOS, so that every row must begin with it.

  Tensors:
    mlp_norm: the name of the norm before the MLP.
    fused: stored tensor of a layer -> the tensors whose rows it holds, one after another.

  Exports:
    heads_divide: whether the stock class requires that the heads divide hidden_size.
    padded_as: a family of the same function without that requirement; '' if there is none.
    gguf: llama.cpp's architecture if all layers are equally wide (`formats.gguf_architectures`).
    gguf_varied: whether llama.cpp's deci, whose layers may differ in width, computes the family.
    mlx: what the stock model of MLX-LM does not support: 'head_dim' (other than hidden_size / heads) or
      'biases'; '' if it supports all. None if there is no code for MLX-LM.
  """

  stock: str
  gguf: str
  base: str = ''
  aliases: tuple[str, ...] = ()
  qkv_bias: str = 'never'
  qk_norm: bool = False
  joint_qk_norm: bool = False
  pre_norm: bool = True
  post_norm: bool = False
  norm_offset: float = 0.0
  activation: str = 'silu'
  root_embedding: bool = False
  sliceable: bool = False
  numbers: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  usual_theta: float = 10000.0
  constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  windows: str = 'unsupported'
  local_rope: bool = False
  unrotated: bool = False
  needs_bos: bool = False
  mlp_norm: str = 'post_attention_layernorm'
  fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  heads_divide: bool = False
  padded_as: str = ''
  gguf_varied: bool = False
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
