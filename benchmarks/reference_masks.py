"""Compares our default method with the masks of the authors' program, at its sizes and with its tokens.

    python -m benchmarks.reference_masks [--windows=20] [--row=1024] [--shared=../shared] [--text NAME=FILE]

SmolLM2-135M-Instruct with 8,192 calibration tokens (the 128 x 64 of the reference; ours reads them as one
stream, as 8 x 1024, or in rows of --row), without training; and with as many tokens more that the dense model
generates itself. Perplexity is measured on windows of WikiText-2 validation text that contain no calibration
row, and on 8,192 tokens of each --text (one or more), for kinds that nothing was calibrated on. Prints a
Markdown table per text with the excess log-perplexity, log of pruned over dense, and its ratio to the
reference's. About half an hour on two cores; each --text takes some minutes more.
"""

import argparse
import dataclasses
import math
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax import api_arguments as arguments
from adapt_jax.data.windows import Blocks, read_for, spread
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.generation import self_text
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.formats.source import Source
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning import surgery
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.pruning.scores import Scores
from benchmarks.reference_parity import ROOT, reference_options, reference_params

# Pruning steps of the reference whose masks are available.
STEPS = (15, 16, 29)
LENGTH = 1024
WIKITEXT = 'data/wikitext-2/wiki.valid.tokens'
OTHER_TOKENS = 8192  # of each --text


def clean_windows(text: pathlib.Path, calibration: np.ndarray, source: Source, count: int) -> Blocks:
  """`count` evenly spaced windows of those that contain no part of a calibration row [S, T]."""
  stream = np.array(source.load_tokenizer()(text.read_text())['input_ids'], np.int32)
  windows = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
  clean = np.ones(len(windows), bool)
  content = stream.tobytes()
  for row in calibration.astype(np.int32):
    at = content.find(row.tobytes())
    while at >= 0 and at % 4:  # not aligned with token ids
      at = content.find(row.tobytes(), at + 1)
    if at >= 0:
      clean[at // 4 // LENGTH : (at // 4 + len(row) - 1) // LENGTH + 1] = False
  rows = np.flatnonzero(clean)
  rows = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
  targets = np.ones((count, LENGTH), bool)
  targets[:, 0] = False
  return Blocks(windows[rows], targets, 1)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--windows', type=int, default=20)
  parser.add_argument('--row', type=int, default=1024)
  parser.add_argument('--text', nargs='*', default=[], metavar='NAME=FILE')
  parser.add_argument('--shared', type=pathlib.Path, default=ROOT.parent / 'shared')
  args = parser.parse_args()
  if not args.shared.is_dir():
    parser.error(f"--shared={args.shared}: no such directory; it holds what the authors' program computed")
  golden = args.shared / 'golden'
  tokens = np.load(golden / 'calib.npy')[:128].astype(np.int32)
  source, params = reference_params()
  config, compiler = source.config, Compiler()
  texts = {'WikiText-2': clean_windows(args.shared / WIKITEXT, tokens, source, args.windows)}
  for name, _, file in (entry.partition('=') for entry in args.text):
    fields = arguments.data_options('text', 'messages')
    found = arguments.blocks(file, fields, config, source.load_tokenizer(), LENGTH, read_for(OTHER_TOKENS))
    texts[name] = spread(found, OTHER_TOKENS)
  evaluators = {
    name: Evaluator(blocks, 4, compiler=compiler, dtype=jnp.float32) for name, blocks in texts.items()
  }

  def perplexities(params: Params, plan: PrunePlan) -> dict[str, float]:
    jax.clear_caches()
    pruned, weights = plan.pruned_config(config), surgery.compact(params, plan)
    return {name: evaluator.perplexity(pruned, weights, name) for name, evaluator in evaluators.items()}

  packed = tokens.reshape(-1, args.row)
  start = PruneState.start(config)

  def score_rows(ids: np.ndarray) -> tuple[Pruner, Scores]:
    options = reference_options(len(ids), args.row, batch=1024 // args.row)
    options = dataclasses.replace(options, method='obs', compat='', compensate='least_squares')
    blocks = Blocks(ids, np.ones_like(ids, bool), 0)
    pruner = Pruner(config, options, blocks, seed=0, compiler=compiler, dtype=jnp.float32)
    return pruner, pruner.score(jax.jit(lambda p: surgery.stack(p, start.plan, jnp.float32))(params), 0)

  with tempfile.TemporaryDirectory() as cache:
    tokenizer, directory = source.load_tokenizer(), pathlib.Path(cache)
    own = np.load(
      self_text.draw(source, tokenizer, *packed.shape, seed=[0], dtype=jnp.float32, directory=directory)
    )
  given, mixture = score_rows(packed), score_rows(np.concatenate([packed, own]))
  dense = perplexities(params, start.plan)
  rows = {name: [f'| dense | {start.plan.params(config):,} | {dense[name]:.2f} | | |'] for name in texts}
  for step in STEPS:
    masks = np.load(golden / f'reference_n128/kept_step{step:02d}.npz')
    theirs = PrunePlan(tuple(masks['kv']), tuple(masks['mlp']))
    ours, mixed = (
      METHODS['obs'](config, pruner.options).step(scores, start, theirs.params(config)).plan
      for pruner, scores in (given, mixture)
    )
    reference: dict[str, float] = {}
    for title, plan, compensator in (
      (f"reference's masks, step {step}", theirs, None),
      ("reference's masks, least squares", theirs, given[0]),
      ('obs', ours, None),
      ('obs, least squares (default)', ours, given[0]),
      ("the same, and as many tokens of the model's own", mixed, mixture[0]),
    ):
      weights = compensator.compensate(params, start.plan, plan, 0) if compensator else params
      for name, value in perplexities(weights, plan).items():
        excess = math.log(value / dense[name])
        share = excess / reference.setdefault(name, excess)
        row = f'| {title} | {plan.params(config):,} | {value:.2f} | {excess:.3f} | {share:.2f} |'
        rows[name].append(row)
        print(name, row, flush=True)
  for name, table in rows.items():
    print(f'\n{name}\n\n| | parameters | perplexity | excess log-perplexity | share |\n|---|---|---|---|---|')
    print('\n'.join(table))


if __name__ == '__main__':
  main()
