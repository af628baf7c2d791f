"""What the authors' program computed on SmolLM2-135M-Instruct, from the files of tests/data."""

import pathlib

import jax.numpy as jnp
import numpy as np

from adapt_jax.data.windows import Blocks
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner
from benchmarks.reference_parity import reference_options, reference_params

DATA = pathlib.Path(__file__).resolve().parents[1] / 'data'
WINDOWS, FIGURES = DATA / 'wikitext_windows.npz', DATA / 'reference_figures.npz'
STEPS = 16  # of its 29 steps
ROWS = 128  # windows on which they were scored
SHAPES = {'kv': (30, 3), 'mlp': (30, 1536)}


def windows() -> tuple[np.ndarray, list[str]]:
  """Token ids [512, 64] that the original tokenizer made of WikiText-2, and the text about each row."""
  found = np.load(WINDOWS)
  return found['tokens'].astype(np.int32), found['texts'].tobytes().decode().split('\0')


class Reference:
  """Figures by name, and states of the run; arrays over steps begin with step 1."""

  def __init__(self) -> None:
    self.figures = dict(np.load(FIGURES))

  def kept(self, step: int) -> dict[str, np.ndarray] | None:
    """Masks `kv` [30, 3] and `mlp` [30, 1536] after a step, where they are given."""
    if f'kept_kv_{step}' not in self.figures:
      return None
    return {
      name: np.unpackbits(self.figures[f'kept_{name}_{step}'], count=shape[0] * shape[1])
      .reshape(shape)
      .astype(bool)
      for name, shape in SHAPES.items()
    }

  def state(self, step: int) -> PruneState:
    """What it keeps after a step of which the masks are given."""
    masks = self.kept(step)
    assert masks, f'no masks of step {step}'
    plan = PrunePlan(tuple(masks['kv']), tuple(masks['mlp']))
    return PruneState(plan, self.figures['sparsity'][step - 1], step)


def reference_pruner() -> tuple[Pruner, Params]:
  """The pruner with the reference's recipe and calibration tokens, and its model's parameters."""
  tokens = windows()[0][:ROWS]
  source, params = reference_params()
  blocks, options = Blocks(tokens, np.ones_like(tokens, bool), 0), reference_options(ROWS, 64, batch=8)
  return Pruner(source.config, options, blocks, seed=0, compiler=Compiler(), dtype=jnp.float32), params
