"""Compares our pruning with compat='reference' with the results of the authors' program, step by step.

    python -m benchmarks.reference_parity [--start=0] [--steps=29] [--golden=../shared/golden]

SmolLM2-135M-Instruct, 128 x 64 calibration tokens, taylor, cosine, A = 0.02, T = 50. Widths and sparsities
after every step are compared with `reference_n128/steps.json`, kept masks with `kept_stepNN.npz`. Prints a
Markdown table; about 30 s per step on two cores. With --start, it begins from the reference's own masks after
that step, for which masks must be available.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.prune_options import CalibrationOptions, PruneOptions
from adapt_jax.data.windows import Blocks
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner, StepRecord

ROOT = pathlib.Path(__file__).parent.parent
# Parameters by which ours may exceed the reference's after its last step: a fraction of a step.
SLACK = 50_000
MODEL = ROOT / 'data/SmolLM2-135M-Instruct.Q4_1.gguf'


def reference_options(rows: int, length: int, batch: int) -> PruneOptions:
  """The reference's recipe."""
  return PruneOptions(
    method='adapt', target=0.5, stages=1, stage_targets='linear', steps=50, ratio=1.0, amplitude=0.02,
    importance='taylor', layer_distance='cosine', align_kv=1, align_ffn=1, serve='any', compat='reference',
    compensate='none',
    calibration=CalibrationOptions(source=(), samples=rows, length=length, batch=batch),
  )  # fmt: skip


def reference_params() -> tuple[Source, Params]:
  """The model as the reference ran it: weights rounded to bfloat16 and kept in fp32."""
  source = open_source(str(MODEL))
  return source, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), source.load_params())


def reference_pruner(golden: pathlib.Path, rows: int) -> tuple[Pruner, Params]:
  """The pruner with the reference's recipe and calibration tokens, and its model's parameters."""
  tokens = np.load(golden / 'calib.npy')[:rows]
  source, params = reference_params()
  blocks, options = Blocks(tokens, np.ones_like(tokens, bool), 0), reference_options(rows, 64, batch=8)
  return Pruner(source.config, options, blocks, seed=0, compiler=Compiler(), dtype=jnp.float32), params


def reference_state(golden: pathlib.Path, step: int) -> PruneState:
  """The reference's state after a step whose masks are available."""
  masks = np.load(golden / f'reference_n128/kept_step{step:02d}.npz')
  steps = json.loads((golden / 'reference_n128/steps.json').read_text())
  plan = PrunePlan(tuple(masks['kv']), tuple(masks['mlp']))
  return PruneState(plan, np.array(steps[step - 1]['sparsity']), step)


def overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Share of the groups kept by the reference that ours also keeps."""
  return float((ours & theirs).sum() / theirs.sum())


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--start', type=int, default=0)
  parser.add_argument('--steps', type=int, default=29)
  parser.add_argument('--golden', type=pathlib.Path, default=ROOT.parent / 'shared/golden')
  args = parser.parse_args()
  if not args.golden.is_dir():
    parser.error(f"--golden={args.golden}: no such directory; it holds what the authors' program computed")
  steps = json.loads((args.golden / 'reference_n128/steps.json').read_text())[: args.steps]
  pruner, params = reference_pruner(args.golden, rows=128)
  print(
    '| step | parameters, reference | ours | KV widths | MLP widths | sparsity off by | kept KV | kept MLP |'
  )
  print('|---|---|---|---|---|---|---|---|', flush=True)

  def show(state: PruneState, record: StepRecord) -> None:
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

  dense = PruneState.start(pruner.config)
  state = reference_state(args.golden, args.start) if args.start else dense
  target = steps[-1]['params'] + SLACK
  for step in pruner.prune(pruner.stack(params, dense.plan), dense.plan, state, target, 'prune'):
    show(*step)


if __name__ == '__main__':
  main()
