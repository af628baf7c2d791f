"""Scoring by curvature, and corrections, by one call for each layer, which shows how far they are.

Either takes minutes on a CPU. `Scorer` and `Compensator` are one program each, with a loop over layers; this
gives the same bits. Between two layers a signal can end the run. For a single device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import loop_options
from adapt_jax.models.network.llama import Params
from adapt_jax.pruning.compensate import Compensator, Streams
from adapt_jax.pruning.scorer import Scorer, micro_batches
from adapt_jax.pruning.scores import Scores
from adapt_jax.training.loss import fisher_cross_entropy

Tick = Callable[[int], None]
FORWARD, BACKWARD = 1, 3  # what one layer counts: about their times


@dataclasses.dataclass(frozen=True)
class _Part:
  """A function of a scorer or a compensator, as a program that runs with equal ones share."""

  fn: Callable[..., Any]
  of: Any
  rows: int

  def __call__(self, *args: Any) -> Any:
    return self.fn(self, *args)


class _ByLayer:
  """Compiles each part once, and calls it.

  name: by which compiles are counted. total: what `tick` is told in all, in one call.
  """

  total: int

  def __init__(self, name: str, of: Any, rows: int, compiler: Compiler):
    self._name, self._of, self._rows, self._compiler = name, of, rows, compiler
    self._programs: dict[Any, Any] = {}
    self._begin = jax.jit(of.begin)

  def _call(self, fn: Callable[..., Any], *args: Any) -> Any:
    preemption.check()
    if fn not in self._programs:
      made, options = _Part(fn, self._of, self._rows), loop_options()
      self._programs[fn] = self._compiler(self._name, made, *args, xla_options=options, part=fn.__name__)
    return preemption.ready(self._programs[fn](*args))


class CurvatureByLayer(_ByLayer):
  """`Scorer` with an importance by curvature."""

  def __init__(self, scorer: Scorer, rows: int, length: int, compiler: Compiler):
    super().__init__('scoring', scorer, rows, compiler)
    self._parts = scorer.parts(rows // scorer.micro_batch, scorer.micro_batch, length)
    self.total = self._parts * scorer.config.num_layers * (FORWARD + BACKWARD)

  def __call__(self, stacked: Params, tokens_ST: jax.Array, tick: Tick) -> Scores:
    layers, L = stacked['layers'], self._of.config.num_layers
    tokens_MBT = micro_batches(tokens_ST, self._of.micro_batch)
    uniform_MBT = self._of.uniform(tokens_MBT)
    numbers = [jnp.int32(i) for i in range(L)]
    sums, costs = list[Any]([None] * L), list[Any]([None] * L)
    distance_L, loss = jnp.zeros(L), jnp.zeros(())
    for part in range(self._parts):
      size = len(tokens_MBT) // self._parts
      some = slice(part * size, (part + 1) * size)
      x_MBTD, inputs, distances = self._begin(stacked, tokens_MBT[some]), list[jax.Array](), list[jax.Array]()
      for i in numbers:
        inputs.append(x_MBTD)
        x_MBTD, distance = self._call(_forward, layers, i, x_MBTD)
        distances.append(distance)
        tick(FORWARD)
      own, g_MBTD = self._call(_head, stacked, x_MBTD, tokens_MBT[some], uniform_MBT[some])
      distance_L, loss = distance_L + jnp.stack(distances) * (1 / self._parts), loss + own
      for i in reversed(range(L)):
        g_MBTD, new = self._call(_moments, layers, numbers[i], inputs.pop(), g_MBTD)
        sums[i] = new if part == 0 else jax.tree.map(jnp.add, sums[i], new)
        if part == self._parts - 1:
          costs[i], sums[i] = self._call(_costs, layers, numbers[i], sums[i]), None
        tick(BACKWARD)
    kv, ffn = (jnp.stack(of_layers) for of_layers in zip(*costs, strict=True))
    return Scores(kv, ffn, distance_L, loss)


class CorrectionByLayer(_ByLayer):
  """`Compensator`, whose changes are then lists over layers."""

  def __init__(self, compensator: Compensator, rows: int, compiler: Compiler):
    super().__init__('compensation', compensator, rows, compiler)
    self.total = compensator.config.num_layers

  def __call__(
    self, stacked: Params, masks: Any, tokens_ST: jax.Array, tick: Tick
  ) -> dict[str, list[jax.Array]]:
    streams, changes = self._begin(stacked, tokens_ST), list[dict[str, jax.Array]]()
    for i in range(self.total):
      streams, change = self._call(_correct, stacked['layers'], masks, jnp.int32(i), streams)
      changes.append(change)
      tick(1)
    return {name: [change[name] for change in changes] for name in changes[0]}


def _at(tree: Any, i: jax.Array) -> Any:
  """One layer of stacked parameters or masks."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _forward(part: _Part, layers: Params, i: jax.Array, x_MBTD: jax.Array) -> tuple[jax.Array, jax.Array]:
  tables = llama.rope(part.of.config, x_MBTD.shape[2])
  y_MBTD, (_, distance, _) = part.of.forward_layer(x_MBTD, (i, _at(layers, i)), tables)
  return y_MBTD, distance


def _head(
  part: _Part, stacked: Params, x_MBTD: jax.Array, tokens_MBT: jax.Array, uniform_MBT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  scale = 1 / (part.rows * (tokens_MBT.shape[2] - 1))
  return part.of.head(stacked, x_MBTD, tokens_MBT, fisher_cross_entropy, scale, uniform_MBT)


def _moments(
  part: _Part, layers: Params, i: jax.Array, x_MBTD: jax.Array, g_MBTD: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
  T = x_MBTD.shape[2]
  positions = llama.rope(part.of.config, T).of(i)
  return part.of.layer_moments(_at(layers, i), x_MBTD, g_MBTD, positions, part.rows * T)


def _costs(part: _Part, layers: Params, i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
  return part.of.costs(_at(layers, i), sums)


def _correct(
  part: _Part, layers: Params, masks: Any, i: jax.Array, streams: Streams
) -> tuple[Streams, dict[str, jax.Array]]:
  return part.of.layer(streams, (i, _at(layers, i), *_at(masks, i)))
