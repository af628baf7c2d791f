"""llama.cpp's architectures: their fields, and what their code takes for granted.

A .gguf file names its architecture, and its header leaves out what is the same in all models of it: which
layers have a sliding window, for example. `implied` adds that when a file is read; when one is written, a
model that is not as `implied` says would be computed wrongly, and is refused (`export.gguf`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, get_tensor_name_map

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.families import FAMILIES, Family
from adapt_jax.models.formats.hf_weights import leaves

# Fields of `ModelConfig` that only some families have; the others have the default.
_NUMBERS = (
  'embedding_scale', 'residual_scale', 'logit_divisor', 'attention_scale', 'attention_cap', 'logit_cap'
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One architecture of llama.cpp."""

  family: str  # of its models, unless the file says otherwise
  # It rotates neighbouring pairs, so that q and k have each head's halves interleaved; the others rotate
  # halves, as Hugging Face does.
  permuted: bool = False
  biases: bool = False  # it reads biases of projections; not used for families that deci computes
  tied: bool | None = None  # whether the head must be the embedding; None if it may be
  square: bool = False  # the query heads must add up to the hidden size
  # Fields of `ModelConfig` -> their key below the architecture's name, and the value without it. The others
  # of `_NUMBERS` have no effect in it.
  numbers: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
  window_every: int = 0  # all layers but every nth have the window; 0: none has
  window: int = 0  # its width in a file that does not say; 0: the file must
  local_theta: float = 0.0  # base frequency of rotary embeddings in layers with a window; 0: as in the others
  unrotated_every: int = 0  # every nth layer has no rotary embeddings; 0: all have
  scale_by_width: int = 0  # the depth of a model whose attention is scaled by the root of hidden size / heads

  @property
  def traits(self) -> Family:
    return FAMILIES[self.family]

  def gguf_names(self, config: ModelConfig) -> dict[str, str]:
    """Hugging Face's name of each tensor of a model -> llama.cpp's; '' if it has none."""
    # They differ only where the outputs of the blocks are normed.
    known = get_tensor_name_map(
      MODEL_ARCH.GEMMA3 if self.traits.post_norm else MODEL_ARCH.QWEN3, config.num_layers
    )
    return {leaf.name: known.get_name(leaf.name, ('.weight', '.bias')) or '' for leaf in leaves(config)}

  def implied(self, config: ModelConfig, window: int) -> ModelConfig:
    """The config with what the architecture fixes; `window` is that of the layers that have one."""

    def layer(number: int, shape: LayerShape) -> LayerShape:
      windowed = self.window_every and number % self.window_every
      rotary = not self.unrotated_every or number % self.unrotated_every > 0
      return dataclasses.replace(shape, window=window if windowed else 0, rotary=rotary)

    layers = tuple(layer(number, shape) for number, shape in enumerate(config.layers, 1))
    without: dict[str, Any] = {n: getattr(ModelConfig, n) for n in _NUMBERS if n not in self.numbers}
    fixed = dataclasses.replace(config, layers=layers, **without)
    if self.traits.root_embedding:
      fixed = dataclasses.replace(fixed, embedding_scale=config.hidden_size**0.5)
    if self.local_theta:
      fixed = dataclasses.replace(fixed, local_rope=RopeConfig(self.local_theta))
    if self.scale_by_width:
      by_width = config.num_layers == self.scale_by_width
      size = config.hidden_size // layers[0].num_heads if by_width else config.head_dim
      fixed = dataclasses.replace(fixed, attention_scale=size**-0.5)
    return fixed


# Mistral and Phi-3 are stored as llama; deci is a llama whose widths differ by layer.
ARCHITECTURES = {
  'llama': Architecture('llama', permuted=True),
  'deci': Architecture('llama', permuted=True),
  'qwen2': Architecture('qwen2'),
  'qwen3': Architecture('qwen3'),
  'gemma2': Architecture(
    'gemma2',
    tied=True,
    numbers={
      'attention_cap': ('attn_logit_softcapping', 50.0),
      'logit_cap': ('final_logit_softcapping', 30.0),
    },
    window_every=2,
    window=4096,
    scale_by_width=46,
  ),
  'gemma3': Architecture('gemma3_text', window_every=6, local_theta=1e4, scale_by_width=62),
  'granite': Architecture(
    'granite',
    permuted=True,
    biases=True,
    numbers={
      'embedding_scale': ('embedding_scale', 1.0),
      'residual_scale': ('residual_scale', 1.0),
      'attention_scale': ('attention.scale', 0.0),
      'logit_divisor': ('logit_scale', 1.0),
    },
  ),
  'smollm3': Architecture('smollm3', permuted=True, unrotated_every=4),
  'olmo2': Architecture('olmo2', tied=False, square=True),
}
