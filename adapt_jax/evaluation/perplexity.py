"""Token perplexity, and divergence from the dense model, over non-overlapping windows."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.data.windows import Blocks
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler, Programs
from adapt_jax.machine.mesh import put_rows
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import row_shards
from adapt_jax.training.loss import capped, distillation, next_token_loss, shift, sum_over_chunks, whole

_MOST_KEPT = 2**29  # bytes of a text's activations, on a device or the host, until they are compared


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


class Reference(NamedTuple):
  """The reference of divergences: a model's head [V, D] and, per batch, its final hidden states [B, T, D].

  The states are on the host, unless processes share them.
  """

  head_VD: jax.Array
  hidden: list[Any]


# Dataclasses, so that runs of one process can share their programs.
@dataclasses.dataclass(frozen=True)
class _Hidden:
  """Final hidden states of a batch, by the name that places them on a mesh."""

  config: ModelConfig
  dtype: Any

  def __call__(self, params: Params, tokens_BT: jax.Array) -> dict[str, jax.Array]:
    return {'hidden': llama.hidden_states(self.config, params, tokens_BT, dtype=self.dtype)}


@dataclasses.dataclass(frozen=True)
class _Loss:
  """(Σ loss, tokens counted) of a batch."""

  logit_cap: float

  def __call__(
    self, head_VD: jax.Array, x_BTD: jax.Array, tokens_BT: jax.Array, targets_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    total = next_token_loss(x_BTD, head_VD, tokens_BT, targets_BT, self.logit_cap)
    return total, shift(tokens_BT, targets_BT)[1].sum()


@dataclasses.dataclass(frozen=True)
class _Divergence:
  """Σ KL(reference ‖ model) over the counted tokens of a batch, and their number."""

  logit_cap: float

  def __call__(
    self,
    head_VD: jax.Array,
    x_BTD: jax.Array,
    reference_VD: jax.Array,
    reference_BTD: jax.Array,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    x_TD, reference_TD = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, reference_BTD))
    labels, weights = shift(tokens_BT, targets_BT)
    kl = distillation(1.0, whole(reference_VD, reference_TD.dtype), self.logit_cap)
    extras = labels, weights, reference_TD
    return sum_over_chunks(capped(kl, self.logit_cap), x_TD, head_VD, extras), weights.sum()


class Evaluator:
  """Perplexity of a model on fixed windows; compiles once per shape of the model.

  Args:
    blocks: the windows [N, T], and which of their tokens count.
    batch: windows at once on a device.
    compiler: counts compiles as `evaluation` and `divergence`.
    dtype: dtype of weights in products and of activations.
    programs: shared with evaluators of other texts, whose batches may have the same shape; two of a name.
  """

  def __init__(
    self,
    blocks: Blocks,
    batch: int,
    *,
    compiler: Compiler,
    dtype: Any,
    programs: Programs | None = None,
  ):
    self.blocks, self.batch = blocks, batch_size(blocks, batch)
    self._compiler, self._dtype = compiler, dtype
    self._programs = programs or Programs(most=2)
    self._kept: dict[str, tuple[ModelConfig, list[Any]]] = {}

  def _run(self, name: str, fn: Any, *args: Any) -> Any:
    """`fn(*args)`, compiled unless it is among the last programs of its kind."""
    key = fn, *((x.shape, str(x.dtype)) for x in jax.tree.leaves(args))
    program = self._programs.get(type(fn).__name__, key, lambda: self._compiler(name, fn, *args))
    return program(*args)

  @property
  def definition(self) -> str:
    """Describes the perplexity in words, for reports."""
    (windows, length), counted = self.blocks.tokens.shape, int(self.blocks.targets.sum())
    return (
      f'exp of the mean next-token cross-entropy over {windows} non-overlapping windows of {length} tokens, '
      f'{counted:,} tokens counted; the first of a window has no context and is skipped'
    )

  def perplexity(
    self,
    config: ModelConfig,
    params: Params,
    title: str,
    *,
    keep: Literal['', 'reference', 'divergence'] = '',
  ) -> float:
    """exp(mean cross-entropy in nats) over all targets of all windows. Raises `Preempted` between batches.

    The next call of the method `keep`, which must be for the same parameters, need not run the model again:
    N · T · D activations are kept, if they take little memory.
    """
    total, count, head_VD = 0.0, 0.0, llama.head(params)
    kept: list[Any] = []
    activations = self.blocks.tokens.size * config.hidden_size
    if keep == 'divergence':
      activations //= row_shards()
    processes = keep == 'reference' and jax.process_count() > 1  # whose devices it would fill during training
    if processes or activations * jnp.dtype(self._dtype).itemsize > _MOST_KEPT:
      keep = ''
    self._kept.pop('divergence', None)
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      for tokens, targets, windows in batches(self.blocks, self.batch):
        preemption.check()
        hidden = self._run('evaluation', _Hidden(config, self._dtype), params, tokens)['hidden']
        loss = self._run('evaluation', _Loss(config.logit_cap), head_VD, hidden, tokens, targets)
        total, count = total + float(loss[0]), count + float(loss[1])
        progress.update(windows, perplexity=f'{math.exp(min(total / max(count, 1), 700)):.2f}')
        if keep:
          kept.append(_on_host(hidden) if keep == 'reference' else hidden)
    if not math.isfinite(total):
      raise InputError(f'{title}: the loss is {total}: check the weights, or set model.dtype = float32')
    if keep:
      self._kept[keep] = config, kept
    return math.exp(min(total / count, 700))

  def reference(self, config: ModelConfig, params: Params, title: str) -> Reference:
    """The reference for `divergence`, N · T · D activations. Raises `Preempted` between batches."""
    of, hidden = self._kept.pop('reference', (None, []))
    if of == config:
      return Reference(llama.head(params), hidden)
    hidden = []
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      for tokens, _, windows in batches(self.blocks, self.batch):
        preemption.check()
        made = self._run('divergence', _Hidden(config, self._dtype), params, tokens)
        hidden.append(_on_host(jax.block_until_ready(made['hidden'])))
        progress.update(windows)
    return Reference(llama.head(params), hidden)

  def divergence(self, config: ModelConfig, params: Params, reference: Reference, title: str) -> float:
    """Mean over all targets of KL(reference ‖ model), nats per token. Raises `Preempted` between batches."""
    total, count, head_VD = 0.0, 0.0, llama.head(params)
    of, kept = self._kept.pop('divergence', (None, []))
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      found = zip(batches(self.blocks, self.batch), reference.hidden, strict=True)
      for i, ((tokens, targets, windows), expected) in enumerate(found):
        preemption.check()
        if of == config:
          hidden = kept[i]
        else:
          hidden = self._run('evaluation', _Hidden(config, self._dtype), params, tokens)['hidden']
        args = head_VD, hidden, reference.head_VD, _on_devices(expected), tokens, targets
        kl = self._run('divergence', _Divergence(config.logit_cap), *args)
        total, count = total + float(kl[0]), count + float(kl[1])
        progress.update(windows, kl=f'{total / max(count, 1):.4f}')
    return total / count


def _on_host(hidden_BTD: jax.Array) -> Any:
  """A copy that takes no memory of devices, if this process has all of it."""
  return np.array(hidden_BTD) if jax.process_count() == 1 else hidden_BTD


def _on_devices(hidden_BTD: Any) -> jax.Array:
  if not isinstance(hidden_BTD, np.ndarray):
    return hidden_BTD
  return put_rows(np.arange(len(hidden_BTD)), lambda ids: (hidden_BTD[ids],))[0]
