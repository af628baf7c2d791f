"""What the authors' program computed on SmolLM2-135M-Instruct, and their pruning with its errors."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.prune_options import CalibrationOptions, PruneOptions
from adapt_jax.data.windows import Blocks
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning.methods.adapt import Adapt
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.pruning.pruner import Pruner
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.pruning.scores import Scores

TESTS = pathlib.Path(__file__).resolve().parents[1]
DATA = TESTS / 'data'
WINDOWS, FIGURES = DATA / 'wikitext_windows.npz', DATA / 'reference_figures.npz'
MODEL = TESTS.parent / 'data/SmolLM2-135M-Instruct.Q4_1.gguf'
STEPS = 16  # of its 29 steps
ROWS = 128  # windows on which they were scored
# Parameters by which ours may exceed the reference's after its last step: a fraction of a step.
SLACK = 50_000
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


class ReferenceScorer(Scorer):
  """Credits query head h to KV group h mod K, as the authors' program does, not to h // G."""

  def score_layer(self, layer: Params, gradient: Params, fisher: Params) -> list[jax.Array]:
    return super().score_layer(*map(_regrouped, (layer, gradient, fisher)))


def _regrouped(layer: Params) -> Params:
  """The layer with its query heads in the groups to which the authors' program credits them."""

  def regroup(x: jax.Array, axis: int) -> jax.Array:
    K, G = x.shape[axis : axis + 2]
    return x.reshape(*x.shape[:axis], G, K, *x.shape[axis + 2 :]).swapaxes(axis, axis + 1)

  heads = {'q': 0, 'q_bias': 0, 'o': 1}
  attention = {
    name: regroup(x, heads[name]) if name in heads else x for name, x in layer['attention'].items()
  }
  return layer | {'attention': attention}


class ReferenceAdapt(Adapt):
  """Keeps the first step at or below the target as it is, instead of landing on the target."""

  def step(self, scores: Scores, state: PruneState, target: int) -> PruneState:
    return super().step(scores, state, 0)


class ReferencePruner(Pruner):
  """Prunes one stage as the authors' program does."""

  def __init__(self, *args: Any, **options: Any):
    super().__init__(*args, method=ReferenceAdapt, **options)
    self._scorer = ReferenceScorer(**vars(self._scorer))


def reference_params() -> tuple[Any, Params]:
  """The model as the reference ran it: weights rounded to bfloat16 and kept in fp32."""
  source = open_source(str(MODEL))
  return source, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), source.load_params())


def reference_pruner() -> tuple[Pruner, Params]:
  """The pruner with the reference's recipe and calibration tokens, and its model's parameters."""
  tokens = windows()[0][:ROWS]
  source, params = reference_params()
  rows = CalibrationOptions(samples=ROWS, length=64, batch=8)
  options = PruneOptions(method='adapt', target=0.5, compensate='none', align_ffn=1, calibration=rows)
  blocks = Blocks(tokens, np.ones_like(tokens, bool), 0)
  pruner = ReferencePruner(source.config, options, blocks, seed=0, compiler=Compiler(), dtype=jnp.float32)
  return pruner, params


def overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
  """Share of the groups kept by the reference that ours also keeps."""
  return float((ours & theirs).sum() / theirs.sum())
