"""Compares our default method with the masks of the authors' program, at its sizes and with its tokens.

    python -m benchmarks.reference_masks [--windows=20] [--row=1024] [--shared=../shared]

SmolLM2-135M-Instruct with 8,192 calibration tokens (the 128 x 64 of the reference; ours reads them as one
stream, as 8 x 1024, or in rows of --row), without training. Perplexity is measured on windows of WikiText-2
validation text that contain no calibration row. Prints a Markdown table with the excess log-perplexity, log
of pruned over dense, and its ratio to the reference's. About a quarter of an hour on two cores.
"""

import argparse
import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.formats.source import Source
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning import surgery
from adapt_jax.pruning.methods import METHODS
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner
from benchmarks.reference_parity import ROOT, reference_options, reference_params

# Pruning steps of the reference whose masks are available.
STEPS = (15, 16, 29)
LENGTH = 1024


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
  parser.add_argument('--shared', type=pathlib.Path, default=ROOT.parent / 'shared')
  args = parser.parse_args()
  if not args.shared.is_dir():
    parser.error(f"--shared={args.shared}: no such directory; it holds what the authors' program computed")
  golden = args.shared / 'golden'
  tokens = np.load(golden / 'calib.npy')[:128].astype(np.int32)
  source, params = reference_params()
  config, compiler = source.config, Compiler()
  blocks = clean_windows(args.shared / 'data/wikitext-2/wiki.valid.tokens', tokens, source, args.windows)
  evaluator = Evaluator(blocks, 4, compiler=compiler, dtype=jnp.float32)

  def perplexity(params: Params, plan: PrunePlan) -> float:
    jax.clear_caches()
    return evaluator.perplexity(plan.pruned_config(config), surgery.compact(params, plan), 'evaluate')

  packed = tokens.reshape(-1, args.row)
  options = reference_options(len(packed), args.row, batch=1024 // args.row)
  options = dataclasses.replace(options, method='obs', compat='', compensate='least_squares')
  rows_read = Blocks(packed, np.ones_like(packed, bool), 0)
  pruner = Pruner(config, options, rows_read, seed=0, compiler=compiler, dtype=jnp.float32)
  start = PruneState.start(config)
  scores = pruner.score(jax.jit(lambda p: surgery.stack(p, start.plan, jnp.float32))(params), 0)
  dense = perplexity(params, start.plan)
  rows = [f'| dense | {start.plan.params(config):,} | {dense:.2f} | | |']
  for step in STEPS:
    masks = np.load(golden / f'reference_n128/kept_step{step:02d}.npz')
    theirs = PrunePlan(tuple(masks['kv']), tuple(masks['mlp']))
    target = theirs.params(config)
    state = METHODS['obs'](config, options).step(scores, start, target)
    excess: dict[str, float] = {}
    for name, plan, compensate in (
      (f"reference's masks, step {step}", theirs, False),
      ("reference's masks, least squares", theirs, True),
      ('obs', state.plan, False),
      ('obs, least squares (default)', state.plan, True),
    ):
      weights = pruner.compensate(params, start.plan, plan, 0) if compensate else params
      value = perplexity(weights, plan)
      excess[name] = math.log(value / dense)
      share = excess[name] / next(iter(excess.values()))
      rows.append(f'| {name} | {plan.params(config):,} | {value:.2f} | {excess[name]:.3f} | {share:.2f} |')
      print(rows[-1], flush=True)
  print('\n| | parameters | perplexity | excess log-perplexity | share |\n|---|---|---|---|---|')
  print('\n'.join(rows))


if __name__ == '__main__':
  main()
