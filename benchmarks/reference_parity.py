"""Our pruning with compat='reference' against what the authors' program computed, step by step.

    python -m benchmarks.reference_parity [--steps=29] [--golden=../shared/golden]

SmolLM2-135M-Instruct, 128 x 64 calibration tokens, taylor, cosine, A = 0.02, T = 50: widths and sparsities
after every step against `reference_n128/steps.json`, kept masks against `kept_stepNN.npz`. Prints a Markdown
table; about 35 s a step on two cores.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.compile import Compiler
from adapt_jax.config import CalibrationOptions, PruneOptions
from adapt_jax.data import Blocks
from adapt_jax.plan import PruneState
from adapt_jax.prune import Pruner, StepRecord
from models.config import count_params
from models.source import open_source

ROOT = pathlib.Path(__file__).parent.parent
MODEL = ROOT / 'data/SmolLM2-135M-Instruct.Q4_1.gguf'


def reference_pruner(golden: pathlib.Path, rows: int) -> tuple[Pruner, dict]:
  """The pruner with the reference's recipe and calibration tokens, and its model's parameters."""
  tokens = np.load(golden / 'calib.npy')[:rows]
  options = PruneOptions(
    method='adapt', target=0.5, stages=1, stage_targets='linear', steps=50, ratio=1.0, amplitude=0.02,
    importance='taylor', layer_distance='cosine', align_ffn=1, compat='reference', compensate='none',
    calibration=CalibrationOptions(source=(), samples=rows, length=64, batch=8),
  )  # fmt: skip
  source = open_source(str(MODEL))
  # The reference ran on weights rounded to bfloat16 and kept in fp32.
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), source.load_params())
  blocks = Blocks(tokens, np.ones_like(tokens, bool), 0)
  pruner = Pruner(source.config, options, blocks, seed=0, compiler=Compiler(), dtype=jnp.float32)
  return pruner, params


def overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Share of the groups that the reference keeps that we keep too."""
  return float((ours & theirs).sum() / theirs.sum())


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--steps', type=int, default=29)
  parser.add_argument('--golden', type=pathlib.Path, default=ROOT.parent / 'shared/golden')
  args = parser.parse_args()
  steps = json.loads((args.golden / 'reference_n128/steps.json').read_text())[: args.steps]
  pruner, params = reference_pruner(args.golden, rows=128)
  print(
    '| step | parameters, reference | ours | KV widths | MLP widths | sparsity off by | kept KV | kept MLP |'
  )
  print('|---|---|---|---|---|---|---|---|', flush=True)

  def on_step(state: PruneState, record: StepRecord) -> None:
    theirs = steps[record.step - 1]
    kv = np.array_equal(record.kv_groups, theirs['num_kv_heads'])
    differing = int(np.sum(np.array(record.ffn) != theirs['ffn']))
    sparsity = np.abs(np.array(record.sparsity) - theirs['sparsity']).max()
    masks = args.golden / f'reference_n128/kept_step{record.step:02d}.npz'
    kept = '| |'
    if masks.exists():
      m = np.load(masks)
      kv_kept, mlp_kept = (
        overlap(np.array(state.plan.kv), m['kv']),
        overlap(np.array(state.plan.ffn), m['mlp']),
      )
      kept = f'{kv_kept:.2%} | {mlp_kept:.2%} |'
    print(
      f'| {record.step} | {theirs["params"]:,} | {record.params:,} | {"equal" if kv else "differ"} | '
      f'{"equal" if not differing else f"{differing} of 30 differ"} | {sparsity:.1e} | {kept}',
      flush=True,
    )

  state = PruneState.start(pruner.config)
  dense, target = state.plan, steps[-1]['params']
  assert target < count_params(pruner.config)
  pruner.prune(params, dense, state, target, on_step, 'prune')


if __name__ == '__main__':
  main()
