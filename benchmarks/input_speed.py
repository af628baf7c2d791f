"""Tokens per second of the training input alone, compared with those of a training step on the same host.

    python -m benchmarks.input_speed [--source=data/sotu/train,...] [--step=346] [--rounds=5] [--write]

Reading: rows of batches of 128 x 1,024 from the cache on disk, with segments. Tokenising: from files
to the cache, once. Step: SmolLM2-135M-Instruct, fp32, 4 x 256 tokens, unless --step gives its tokens/s.
Prints medians with lowest and highest; exit code 1 unless the input is ten times as fast as the step.
About four minutes on two cores.
"""

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import RunOptions
from adapt_jax.configs import base
from adapt_jax.data.train_set import TrainSet, open_train_set
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.training.optim import optimizer as make_optimizer
from adapt_jax.training.step import TrainingStep
from benchmarks import side_by_side

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ROOT / 'data/SmolLM2-135M-Instruct.Q4_1.gguf'
SHARED = ROOT.parent / 'shared/data'
SOURCES = (
  ROOT / 'data/sotu/train',
  SHARED / 'c4',
  SHARED / 'instruct',
  SHARED / 'wikitext-2/wiki.train.tokens',
)
ENOUGH = 10


def options(source: tuple[str, ...], cache: pathlib.Path, **train: Any) -> RunOptions:
  """Options for training on every document of the sources."""
  config = base.get_config()
  config.data.cache = str(cache)
  config.train.update(source=source, tokens=10**12, lr=1e-4, **train)
  return from_dict(config.to_dict())


def rates(tokens: int, work: Callable[[int], object], repeats: int) -> list[float]:
  """Tokens per second of work(0), work(1) …, which process `tokens` each."""
  found = []
  for index in range(repeats):
    start = time.perf_counter()
    work(index)
    found.append(tokens / (time.perf_counter() - start))
  return found


def tokenising(source: tuple[str, ...], tokenizer: Any, vocab: int, repeats: int) -> tuple[int, list[float]]:
  """Tokens of the source, and tokens per second from files to an opened train set."""
  with tempfile.TemporaryDirectory() as directory:

    def work(index: int) -> TrainSet:
      o = options(source, pathlib.Path(directory) / str(index))
      return open_train_set(o.train, o.data, tokenizer, vocab, 0)

    tokens = len(work(-1)) * 1024
    return tokens, rates(tokens, work, repeats)


def reading(source: tuple[str, ...], tokenizer: Any, vocab: int, repeats: int) -> tuple[float, list[float]]:
  """Seconds to open tokens that are on disk, and tokens per second of reading 20 batches' rows."""
  with tempfile.TemporaryDirectory() as directory:
    o = options(source, pathlib.Path(directory))
    open_train_set(o.train, o.data, tokenizer, vocab, 0)
    start = time.perf_counter()
    data = open_train_set(o.train, o.data, tokenizer, vocab, 0)
    seconds = time.perf_counter() - start

    def work(index: int) -> None:
      for step in range(20 * index, 20 * index + 20):
        data.read(data.rows(step))

    return seconds, rates(20 * o.train.batch * o.train.length, work, repeats)


def training(source: Source, repeats: int) -> list[float]:
  """Tokens per second of the training step, without compilation."""
  o = options((), pathlib.Path(), batch=4, micro_batch=4, length=256)
  optimizer = make_optimizer(o.train, 100)
  params = jax.tree.map(jnp.asarray, source.load_params('float32'))
  state = {'params': params, 'optimizer': optimizer.init(params)}
  step = TrainingStep(source.config, o.train, optimizer, jnp.float32)
  tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (4, 256)).astype(np.int32)
  batch = tokens, np.ones_like(tokens, bool), np.ones_like(tokens)
  step = Compiler()('training', step, state, batch, donate_argnums=(0,))

  def work(_: int) -> None:
    nonlocal state
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  work(0)
  return rates(tokens.size, work, repeats)


def main() -> None:
  parser = side_by_side.parser(__doc__, rounds=5)
  parser.add_argument('--source', default=','.join(str(path) for path in SOURCES if path.exists()))
  parser.add_argument('--step', type=float, default=0.0)
  args = parser.parse_args()
  model = open_source(str(MODEL))
  tokenizer, vocab = model.load_tokenizer(), model.config.vocab_size
  source = tuple(args.source.split(','))
  tokens, tokenised = tokenising(source, tokenizer, vocab, args.rounds)
  seconds, read = reading(source, tokenizer, vocab, args.rounds)
  steps = [args.step] if args.step else training(model, args.rounds)
  step = statistics.median(steps)
  rows = {
    f'tokenising, once, {tokens:,} tokens': tokenised,
    f'reading packed rows of 128 x 1,024 from the cache, opened in {seconds:.2f} s': read,
    'training step, fp32, 4 x 256': steps,
  }
  lines = ['| | tokens/s | times the step |', '|---|---|---|']
  for title, found in rows.items():
    lines.append(f'| {title} | {side_by_side.spread(found, 0)} | {statistics.median(found) / step:,.0f} |')
  aim = f'SmolLM2-135M-Instruct, dense; the aim is {ENOUGH} times the step. Page cache warm.'
  side_by_side.report('Training input', f'{aim}\n\n' + '\n'.join(lines), args.write)
  if min(map(statistics.median, (read, tokenised))) < ENOUGH * step:
    raise SystemExit(f'the input is less than {ENOUGH} times as fast as the training step')


if __name__ == '__main__':
  main()
