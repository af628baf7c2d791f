"""Token perplexity, and divergence from the dense model, over non-overlapping windows."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from adapt_jax.data.windows import Blocks
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import put_rows
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import row_shards
from adapt_jax.training.loss import capped, distillation, next_token_loss, shift, sum_over_chunks, whole


def tokens_per_byte(blocks: Blocks, tokenizer: Any) -> float:
  """Counted tokens of the windows per byte of their text in UTF-8.

  Times log2(perplexity) this is bits per byte, which can be compared between tokenizers. A window may begin
  or end within a character, which is decoded as a replacement of three bytes.
  """
  rows = [row[counted].tolist() for row, counted in zip(blocks.tokens, blocks.targets, strict=True)]
  texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
  return int(blocks.targets.sum()) / max(1, sum(len(text.encode()) for text in texts))


def batch_size(blocks: Blocks, most: int) -> int:
  """Windows per batch: at most `most` on a device, the same number on each."""
  shards = row_shards()
  return shards * min(most, -(-len(blocks.tokens) // shards))


def batches(blocks: Blocks, size: int) -> Iterator[tuple[jax.Array, jax.Array, int]]:
  """Yields (tokens [size, T], targets [size, T], windows); rows that pad the last batch have no targets."""
  count = len(blocks.tokens)

  def read(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inside = ids < count
    found = np.where(inside, ids, 0)
    return blocks.tokens[found], blocks.targets[found] & inside[:, None]

  for start in range(0, count, size):
    tokens, targets = put_rows(np.arange(start, start + size), read)
    yield tokens, targets, min(size, count - start)


@dataclasses.dataclass(frozen=True)
class _Loss:
  """(Σ loss, tokens counted) of a batch; a dataclass, so that runs of one process can share its program."""

  config: ModelConfig
  dtype: Any

  def __call__(
    self, params: Params, tokens_BT: jax.Array, targets_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    x_BTD = llama.hidden_states(self.config, params, tokens_BT, dtype=self.dtype)
    total = next_token_loss(x_BTD, llama.head(params), tokens_BT, targets_BT, self.config.logit_cap)
    return total, shift(tokens_BT, targets_BT)[1].sum()


class Reference(NamedTuple):
  """The reference of divergences: a model's head [V, D] and, per batch, its final hidden states [B, T, D]."""

  head_VD: jax.Array
  hidden: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class _Hidden:
  """Final hidden states of a batch."""

  config: ModelConfig
  dtype: Any

  def __call__(self, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return llama.hidden_states(self.config, params, tokens_BT, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class _Divergence:
  """Σ KL(reference ‖ model) over the counted tokens of a batch, and their number."""

  config: ModelConfig
  dtype: Any

  def __call__(
    self,
    params: Params,
    head_VD: jax.Array,
    reference_BTD: jax.Array,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    x_BTD = llama.hidden_states(self.config, params, tokens_BT, dtype=self.dtype)
    x_TD, reference_TD = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, reference_BTD))
    labels, weights = shift(tokens_BT, targets_BT)
    cap = self.config.logit_cap  # that of the reference too
    kl = capped(distillation(1.0, whole(head_VD, reference_TD.dtype), cap), cap)
    return sum_over_chunks(kl, x_TD, llama.head(params), (labels, weights, reference_TD)), weights.sum()


class Evaluator:
  """Perplexity of a model on fixed windows; compiles once per shape of the model.

  Args:
    blocks: the windows [N, T], and which of their tokens count.
    batch: windows at once on a device.
    compiler: counts compiles as `evaluation` and `divergence`.
    dtype: dtype of weights in products and of activations.
    programs: shared with evaluators of other texts, whose batches may have the same shape.
  """

  def __init__(
    self,
    blocks: Blocks,
    batch: int,
    *,
    compiler: Compiler,
    dtype: Any,
    programs: dict[type, tuple[Any, Any]] | None = None,
  ):
    self.blocks, self.batch = blocks, batch_size(blocks, batch)
    self._compiler, self._dtype = compiler, dtype
    self._programs = {} if programs is None else programs  # the last one used of each kind

  def _program(self, name: str, fn: Any, tokens: jax.Array, *args: Any) -> Any:
    """`fn` compiled for `args`, or the last program of its kind if that is the same."""
    key = fn, tokens.shape, *(str(x.dtype) for x in jax.tree.leaves(args))
    if self._programs.get(type(fn), (None,))[0] != key:
      self._programs[type(fn)] = key, self._compiler(name, fn, *args)
    return self._programs[type(fn)][1]

  @property
  def definition(self) -> str:
    """Describes the perplexity in words, for reports."""
    (windows, length), counted = self.blocks.tokens.shape, int(self.blocks.targets.sum())
    return (
      f'exp of the mean next-token cross-entropy over {windows} non-overlapping windows of {length} tokens, '
      f'{counted:,} tokens counted; the first of a window has no context and is skipped'
    )

  def perplexity(self, config: ModelConfig, params: Params, title: str) -> float:
    """exp(mean cross-entropy in nats) over all targets of all windows. Raises `Preempted` between batches."""
    total = count = 0.0
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      for tokens, targets, windows in batches(self.blocks, self.batch):
        preemption.check()
        args = params, tokens, targets
        program = self._program('evaluation', _Loss(config, self._dtype), tokens, *args)
        batch_total, batch_count = program(*args)
        total, count = total + float(batch_total), count + float(batch_count)
        progress.update(windows, perplexity=f'{math.exp(min(total / max(count, 1), 700)):.2f}')
    if not math.isfinite(total):
      raise InputError(f'{title}: the loss is {total}: check the weights, or set model.dtype = float32')
    return math.exp(min(total / count, 700))

  def reference(self, config: ModelConfig, params: Params, title: str) -> Reference:
    """The reference for `divergence`, N · T · D activations. Raises `Preempted` between batches."""
    hidden: list[jax.Array] = []
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      for tokens, _, windows in batches(self.blocks, self.batch):
        preemption.check()
        program = self._program('divergence', _Hidden(config, self._dtype), tokens, params, tokens)
        hidden.append(program(params, tokens))
        progress.update(windows)
    return Reference(llama.head(params), hidden)

  def divergence(self, config: ModelConfig, params: Params, reference: Reference, title: str) -> float:
    """Mean over all targets of KL(reference ‖ model), nats per token. Raises `Preempted` between batches."""
    total = count = 0.0
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      found = zip(batches(self.blocks, self.batch), reference.hidden, strict=True)
      for (tokens, targets, windows), hidden in found:
        preemption.check()
        args = params, reference.head_VD, hidden, tokens, targets
        program = self._program('divergence', _Divergence(config, self._dtype), tokens, *args)
        batch_total, batch_count = program(*args)
        total, count = total + float(batch_total), count + float(batch_count)
        progress.update(windows, kl=f'{total / max(count, 1):.4f}')
    return total / count
