"""Frozen description of a decoder whose layers may differ in width.

It determines the shape of every array, is hashable, and does not import JAX.
Dimension letters used throughout the project: B batch, T query positions, S key
positions, D hidden, N query heads, K KV heads, G = N/K query heads of a KV
group, H head_dim, F MLP width, V vocabulary, L layers.
"""

import dataclasses

from adapt_jax.models.families import FAMILIES, Family


@dataclasses.dataclass(frozen=True)
class LayerShape:
  """Widths of one decoder layer, which pruning changes, and its kind of attention."""

  num_heads: int  # N, query heads
  num_kv_heads: int  # K, key/value heads; divides num_heads
  ffn: int  # F, MLP channels
  window: int = 0  # tokens that a query sees, its own included; 0: all before it
  rotary: bool = True  # whether queries and keys are rotated

  def __post_init__(self) -> None:
    if min(self.widths) < 1 or self.window < 0 or self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'{self}: num_heads must be a multiple of num_kv_heads, no width 0, no window negative'
      )

  @property
  def widths(self) -> tuple[int, int, int]:
    """N, K and F."""
    return self.num_heads, self.num_kv_heads, self.ffn

  @property
  def group_size(self) -> int:
    """G, the query heads that share one KV head."""
    return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Frequency scaling of LLaMA 3.1 and later (rope type `llama3`)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """All frequencies divided by `factor` (rope type `linear`; Chen et al., arXiv 2306.15595)."""

  factor: float


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding: base frequency and optional scaling."""

  theta: float
  scaling: Llama3Scaling | LinearScaling | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A LLaMA-like decoder, layer by layer.

  `family` names the Hugging Face architecture that computes the same function: a key of `FAMILIES`.
  """

  family: str
  vocab_size: int
  hidden_size: int
  head_dim: int
  layers: tuple[LayerShape, ...]
  rope: RopeConfig
  rms_norm_eps: float
  tie_embeddings: bool
  qkv_bias: bool = False
  output_bias: bool = False  # on both o_proj and down_proj; set by pruning compensation
  qk_norm: bool = False
  max_position: int = 2048
  # SliceGPT: width of the residual stream before it was sliced to `hidden_size`; 0 if not sliced. The norms
  # of a sliced model have no gains and divide by this width; every residual connection has a matrix.
  sliced_from: int = 0
  # Factors of the embeddings and of what a block adds to the stream, and a divisor of the logits.
  embedding_scale: float = 1.0
  residual_scale: float = 1.0
  logit_divisor: float = 1.0
  attention_scale: float = 0.0  # of the products of queries and keys; 0: 1 / sqrt(head_dim)
  # Bounds of the attention's logits and of the model's (cap · tanh(x / cap)); 0: none.
  attention_cap: float = 0.0
  logit_cap: float = 0.0
  local_rope: RopeConfig | None = None  # of layers with a window; None: as the others

  def __post_init__(self) -> None:
    least = min(self.num_layers, self.hidden_size, self.head_dim, self.vocab_size, self.max_position)
    if least < 1 or self.head_dim % 2:
      raise ValueError(
        f'{self.num_layers} layers, hidden_size {self.hidden_size}, head_dim {self.head_dim}, vocab_size '
        f'{self.vocab_size}, max_position {self.max_position}: none may be below 1, and head_dim must be even'
      )
    if self.traits.joint_qk_norm and len({s.widths[:2] for s in self.layers}) > 1:
      raise ValueError(f'{self.family} norms all heads of a layer together: all layers need the same heads')

  @property
  def norm_offset(self) -> float:
    """What is added to the weights of all norms."""
    return self.traits.norm_offset

  @property
  def attention_factor(self) -> float:
    """The factor of the products of queries and keys."""
    return self.attention_scale or self.head_dim**-0.5

  @property
  def traits(self) -> Family:
    """What distinguishes the family from Llama."""
    return FAMILIES[self.family]

  @property
  def num_layers(self) -> int:
    return len(self.layers)

  @property
  def uniform(self) -> bool:
    """True if all layers have the same widths, as stock checkpoints do."""
    return len({shape.widths for shape in self.layers}) == 1

  @property
  def o_bias(self) -> bool:
    """Whether o_proj has a bias: with `output_bias`, or with q, k and v if the family makes that optional."""
    return self.output_bias or (self.qkv_bias and self.traits.qkv_bias == 'optional')

  def with_layers(self, layers: tuple[LayerShape, ...]) -> 'ModelConfig':
    """The same model with other widths."""
    return dataclasses.replace(self, layers=tuple(layers))


def kv_group_params(config: ModelConfig, group_size: int) -> int:
  """Stored parameters removed with one KV group: its K, V, G query heads and output columns."""
  weights = (2 + 2 * group_size) * config.head_dim * config.hidden_size
  biases = (2 + group_size) * config.head_dim if config.qkv_bias else 0
  return weights + biases


def channel_params(config: ModelConfig) -> int:
  """Stored parameters removed with one MLP channel: a row of gate and up, a column of down."""
  return 3 * config.hidden_size


def layer_params(config: ModelConfig, shape: LayerShape) -> int:
  """Stored parameters of one decoder layer, with biases and norms (or the matrices that replace norms)."""
  D = config.hidden_size
  norms = 2 * D * D if config.sliced_from else 2 * D * (config.traits.pre_norm + config.traits.post_norm)
  if config.qk_norm:
    heads = shape.num_heads + shape.num_kv_heads if config.traits.joint_qk_norm else 2
    norms += heads * config.head_dim
  attention = shape.num_kv_heads * kv_group_params(config, shape.group_size)
  biases = (config.o_bias + config.output_bias) * config.hidden_size
  return attention + shape.ffn * channel_params(config) + norms + biases


def count_params(config: ModelConfig) -> int:
  """Stored parameters; a tied embedding counts once."""
  D = config.hidden_size
  tables = config.vocab_size * D * (1 if config.tie_embeddings else 2)
  norm = D if not config.sliced_from else D * D if config.tie_embeddings else 0
  return tables + norm + sum(layer_params(config, s) for s in config.layers)
