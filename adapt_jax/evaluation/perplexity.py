"""Token perplexity over non-overlapping windows."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adapt_jax.data.windows import Blocks
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import put_rows
from adapt_jax.machine.progress import Progress
from adapt_jax.training.loss import next_token_loss, shift
from models.config import ModelConfig
from models.errors import InputError
from models.network import llama
from models.network.llama import Params
from models.network.sharding import row_shards


def definition(blocks: Blocks) -> str:
  """What a perplexity on these windows is, in words, for reports."""
  windows, length = blocks.tokens.shape
  return (
    f'exp of the mean next-token cross-entropy over {windows} non-overlapping windows of {length} tokens, '
    f'{int(blocks.targets.sum()):,} tokens counted; the first of a window has no context and is not'
  )


def batch_size(blocks: Blocks, most: int) -> int:
  """Windows at once: at most `most` on a device, as many on each."""
  shards = row_shards()
  return shards * min(most, -(-len(blocks.tokens) // shards))


def batches(blocks: Blocks, size: int) -> Iterator[tuple[jax.Array, jax.Array, int]]:
  """(tokens [size, T], targets [size, T], windows in it); what fills up the last batch does not count."""
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
    total = next_token_loss(x_BTD, llama.head(params), tokens_BT, targets_BT)
    return total, shift(tokens_BT, targets_BT)[1].sum()


class Evaluator:
  """Perplexity of a model on fixed windows; compiles once per shape of the model.

  Args:
    blocks: the windows [N, T] and which of their tokens count.
    batch: windows at once on a device.
    compiler: counts compiles as `evaluation`.
    dtype: of weights in products and of activations.
  """

  def __init__(self, blocks: Blocks, batch: int, *, compiler: Compiler, dtype: Any):
    self.blocks, self.batch = blocks, batch_size(blocks, batch)
    self._compiler, self._dtype = compiler, dtype
    self._compiled_for: ModelConfig | None = None
    self._program: Any = None

  @property
  def definition(self) -> str:
    """What the figure is, in words, for reports."""
    return definition(self.blocks)

  def perplexity(self, config: ModelConfig, params: Params, title: str) -> float:
    """exp(mean cross-entropy in nats) over all targets of all windows. Raises `Preempted` between batches."""
    total = count = 0.0
    size = self.batch
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      for tokens, targets, windows in batches(self.blocks, size):
        preemption.check()
        if self._compiled_for != config:
          loss = _Loss(config, self._dtype)
          self._program = self._compiler('evaluation', loss, params, tokens, targets)
          self._compiled_for = config
        batch_total, batch_count = self._program(params, tokens, targets)
        total, count = total + float(batch_total), count + float(batch_count)
        progress.update(windows, perplexity=f'{math.exp(min(total / max(count, 1), 700)):.2f}')
    if not math.isfinite(total):
      raise InputError(f'{title}: the loss is {total}: check the weights and config.export.dtype')
    return math.exp(min(total / count, 700))
