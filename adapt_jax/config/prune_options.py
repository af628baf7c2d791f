"""The options of pruning, `config.prune`: what is removed, on which rows, and how the rest is adjusted."""

import dataclasses
import math

from adapt_jax.config.declare import ALIGNMENT, COUNT, LENGTH, group, option
from adapt_jax.config.targets import Asked, Target, listed, parse
from adapt_jax.config.values import (
  GGUF_BLOCK,
  GGUF_QUANTISED,
  K_BLOCK,
  K_QUANTS,
  Multiples,
  serving_multiples,
)
from adapt_jax.models.errors import InputError


@dataclasses.dataclass(frozen=True)
class CalibrationOptions:
  """The rows used for scoring and for compensation."""

  source: tuple[str, ...] = option(
    (),
    'Text of the kinds that the model should stay good at; rows are drawn from the first 4 million tokens. '
    'self: the dense model generates all rows. Mode trim reads all of it, and keeps its tokens.',
  )
  weights: tuple[float, ...] = option(
    (),
    'Share of the rows for each entry of source. Empty: the entries are concatenated, and their first 4 '
    'million tokens are used.',
  )
  own: float = option(
    0.25,
    'Share of the rows that the dense model generates beside source, so that it stays good at what source '
    'lacks (docs/texts.md).',
    within=(0, 1),
  )
  layout: str = option(
    'packed',
    'packed: documents are concatenated and cut into rows. documents: one row from each document that is '
    'long enough, at a random place, as in the paper. Rows of a .npy file and of self are used as they are.',
    choices=('packed', 'documents'),
  )
  samples: int = option(32, 'Number of rows, redrawn at every pruning step (512 in the paper).', within=COUNT)
  length: int = option(
    1024,
    'Tokens per row; best as long as the texts that the model will see (64 in the paper).',
    within=LENGTH,
  )
  batch: int = option(
    4, 'Maximum rows per device that pass through a layer at once.', within=COUNT, result=False
  )


# Methods that follow the paper's schedule step by step; the authors' code has these two.
PROGRESSIVE = ('adapt', 'uniform')


@dataclasses.dataclass(frozen=True)
class PruneOptions:
  """What is removed, and how the remaining weights are adjusted (docs/methods.md)."""

  method: str = option(
    'obs',
    'obs removes the groups whose removal raises the loss least per parameter, in one shot per stage. adapt '
    'is Adapt-Pruner, the method of the paper: it prunes step by step, and important layers less. uniform '
    'follows the same schedule with equal sparsity in all layers. The others are baselines, in one shot per '
    'stage (wanda_sp: layer by layer); slicegpt narrows the residual stream instead, and its model cannot be '
    'trained or compensated.',
    choices=(
      'obs', 'adapt', 'uniform', 'llm_pruner', 'flap', 'wanda_sp', 'magnitude', 'shortgpt', 'slicegpt',
    ),
  )  # fmt: skip
  compensate: str = option(
    'least_squares',
    'How the remaining weights compensate for removed groups, without training. least_squares refits o_proj '
    'and down_proj on the calibration rows; bias adds biases to them, as in FLAP.',
    choices=('none', 'least_squares', 'bias'),
  )
  target: Asked = option(
    0.8,
    'What to keep (docs/budgets.md). 0.8: a fraction of the parameters; 100M: their number. 0.5kv, 0.7flops, '
    '0.7memory, 0.7latency: a fraction of the KV cache per token, of the operations per token, of weights '
    'and KV cache, or of the time of a request. 12ms: of a request. 20tok/s: of decoding. 600MB: of the '
    'exported weights; 600MB@q4_k_m: of a GGUF file of this type, which the run then writes. Several, '
    'separated by commas, are sizes of one run (modes prune, accel, estimate). bench.batch, '
    'bench.prompt_length and bench.new_tokens describe the request.',
  )
  latency_table: str = option(
    '',
    'For targets in latency, ms or tok/s: the report.json that mode bench wrote for the dense model, on the '
    'machine that will run the result; or h100, h200, a100, tpu-v5e, tpu-v5p or tpu-v6e, by its published '
    'peaks.',
  )
  attention: str = option(
    'auto',
    'What is removed from attention: whole KV heads with their query heads (kv_groups), or query heads, '
    'equally many of each KV head in a layer (query_heads). auto: query_heads for models with one KV head '
    'per layer or pruned by query heads before, unless target is of kv; otherwise kv_groups. '
    'With a measured latency_table, auto is the unit that the table was measured for.',
    choices=('auto', 'kv_groups', 'query_heads'),
  )
  stages: int = option(1, 'Rounds of pruning and recovery (N in the paper).', within=(1, 10_000))
  stage_targets: str = option(
    'linear', 'How the cost of the model decreases from stage to stage.', choices=('linear', 'geometric')
  )
  steps: int = option(
    50,
    'For adapt and uniform: number of steps to reach the sparsity ratio (T in the paper).',
    within=(1, 1_000_000),
  )
  amplitude: float = option(
    0.02,
    "For adapt: how much a layer's importance changes its sparsity at each step (A in the paper).",
    within=(0, 1),
  )
  importance: str = option(
    'taylor',
    'For adapt and uniform: the score of a group. The other methods have their own.',
    choices=(
      'taylor', 'taylor_vectorize', 'taylor_second', 'taylor_mix', 'l1', 'l2', 'fluctuation', 'wanda',
      'curvature', 'random',
    ),
  )  # fmt: skip
  layer_distance: str = option(
    'cosine',
    "Distance between a layer's input and output, its importance for adapt. Other methods only report it "
    '(shortgpt always uses cosine).',
    choices=('cosine', 'euclidean', 'manhattan'),
  )
  align_ffn: int = option(
    32,
    'Each layer keeps a multiple of this many MLP channels, or all of them. 32 is a block of Q8_0 and Q4_0; '
    '64 to 256 suit tensor cores and K-quants. 1: as in the paper.',
    within=ALIGNMENT,
  )
  serve: str = option(
    'any',
    'The program that will run the pruned model (docs/serving.md). gguf keeps multiples of 32 MLP channels '
    'for the quantised types of llama.cpp (set align_ffn = 256 for K-quants). awq keeps multiples of 128 for '
    'the groups of AWQ and GPTQ. tensor_parallel=n keeps KV heads and MLP channels that n devices can split '
    'evenly. Several are separated by commas.',
  )
  heal: int = option(
    1,
    'Passes of distillation over the calibration rows that end pruning: the dense model teaches the pruned '
    'one, in fp32 weights and with the memory of training. 0: none, as in the paper.',
    within=(0, 1000),
  )
  calibration: CalibrationOptions = group(CalibrationOptions)

  @property
  def prunes(self) -> bool:
    """Whether the run prunes. Mode recover asks for the whole model, and has no text to calibrate on."""
    asked = self.method, self.target, self.compensate, self.heal, self.calibration.source
    return asked != ('obs', 1.0, 'none', 0, ())

  @property
  def limit(self) -> Target:
    """The target of a run of one size. Raises InputError if there are several."""
    if isinstance(self.target, tuple):
      raise InputError(
        f'prune.target = {self.target!r}: only modes prune, accel and estimate take several sizes: give one'
      )
    return parse(self.target)

  @property
  def limits(self) -> tuple[Target, ...]:
    """The targets of all sizes."""
    return tuple(map(parse, listed(self.target)))

  @property
  def multiples(self) -> Multiples:
    """What the widths of every layer must be multiples of, by `serve`, `align_ffn` and the type in `target`.

    Quantised GGUF files store rows that are no whole blocks in larger types: fewer channels may take more.
    """
    asked, kind = serving_multiples(self.serve), self.limit.type
    block = K_BLOCK if kind in K_QUANTS else GGUF_BLOCK if kind in GGUF_QUANTISED else 1
    return asked._replace(ffn=math.lcm(asked.ffn, self.align_ffn, block))
