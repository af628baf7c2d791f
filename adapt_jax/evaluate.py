"""Token perplexity over non-overlapping windows."""

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.compile import Compiler
from adapt_jax.config import RunOptions
from adapt_jax.data import Blocks
from adapt_jax.inputs import Loader, compute_dtype
from adapt_jax.loss import next_token_loss, shift
from adapt_jax.progress import Progress
from adapt_jax.report import versions
from adapt_jax.workdir import Workdir
from models import llama
from models.config import ModelConfig, count_params
from models.errors import InputError
from models.files import write_text
from models.llama import Params
from models.source import open_source


def definition(blocks: Blocks) -> str:
  """What a perplexity on these windows is, in words, for reports."""
  windows, length = blocks.tokens.shape
  return (
    f'exp of the mean next-token cross-entropy over {windows} non-overlapping windows of {length} tokens, '
    f'{int(blocks.targets.sum()):,} tokens counted; the first of a window has no context and is not'
  )


def batches(blocks: Blocks, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
  """(tokens [size, T], targets [size, T], windows in it); what fills up the last batch does not count."""
  for start in range(0, len(blocks.tokens), size):
    rows = slice(start, start + size)
    tokens, targets = blocks.tokens[rows], blocks.targets[rows]
    windows = len(tokens)
    if missing := size - windows:
      tokens = np.concatenate([tokens, np.zeros_like(tokens, shape=(missing, tokens.shape[1]))])
      targets = np.concatenate([targets, np.zeros_like(targets, shape=(missing, targets.shape[1]))])
    yield tokens, targets, windows


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
    batch: windows at once.
    compiler: counts compiles as `evaluation`.
    dtype: of weights in products and of activations.
  """

  def __init__(self, blocks: Blocks, batch: int, *, compiler: Compiler, dtype: Any):
    self.blocks, self.batch = blocks, min(batch, len(blocks.tokens))
    self._compiler, self._dtype = compiler, dtype
    self._compiled_for: ModelConfig | None = None
    self._program: Any = None

  @property
  def definition(self) -> str:
    """What the figure is, in words, for reports."""
    return definition(self.blocks)

  def perplexity(self, config: ModelConfig, params: Params, title: str) -> float:
    """exp(mean cross-entropy in nats) over all targets of all windows."""
    total = count = 0.0
    size = self.batch
    with Progress(title, len(self.blocks.tokens), 'windows') as progress:
      for tokens, targets, windows in batches(self.blocks, size):
        if self._compiled_for != config:
          loss = _Loss(config, self._dtype)
          self._program = self._compiler('evaluation', loss, params, tokens, targets)
          self._compiled_for = config
        batch_total, batch_count = self._program(params, jnp.asarray(tokens), jnp.asarray(targets))
        total, count = total + float(batch_total), count + float(batch_count)
        progress.update(windows, perplexity=f'{math.exp(min(total / max(count, 1), 700)):.2f}')
    if not math.isfinite(total):
      raise InputError(f'{title}: the loss is {total}: check the weights and config.export.dtype')
    return math.exp(min(total / count, 700))


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Mode evaluate: perplexity of model.source on evaluate.source, into report.json."""
  source = open_source(options.model.source)
  blocks = Loader(options, source.load_tokenizer(), source.config).evaluation()
  workdir.claim()
  dtype = compute_dtype(options.model.dtype)
  compiler = Compiler()
  evaluator = Evaluator(blocks, options.evaluate.batch, compiler=compiler, dtype=dtype)
  start = time.monotonic()
  value = evaluator.perplexity(source.config, source.load_params(dtype), 'evaluate')
  report: dict[str, Any] = {
    'model': {'source': source.name, 'params_before': count_params(source.config)},
    'perplexity': {'dense': value, 'definition': evaluator.definition},
    'command': command,
    'compiles': compiler.counts,
    'seconds': time.monotonic() - start,
    'versions': versions(),
  }
  write_text(workdir.report, json.dumps(report, indent=2) + '\n')
  print(f'{count_params(source.config):,} parameters, perplexity {value:.3f}: {evaluator.definition}')
