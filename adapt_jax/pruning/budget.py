"""What a model costs in the unit of `prune.target`, layer by layer: the quantity that pruning reduces.

A cost is a whole number of small parts of the unit, so that sums are exact: parameters, operations, bytes, or
picoseconds. NumPy only.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from adapt_jax.config.targets import Target, parse
from adapt_jax.config.units import UNITS, Unit, amount
from adapt_jax.models.config import (
  LayerShape,
  ModelConfig,
  channel_params,
  count_params,
  layer_params,
)
from adapt_jax.pruning.attention_units import KV_GROUPS, AttentionUnit


class LayerCost(NamedTuple):
  """The cost of one layer: of what no width changes, and of attention [K + 1] and MLP [F + 1] by width.

  `attention[k]` is the cost of k KV groups with their query heads, or of k query heads of every KV head (the
  KV heads are then in `rest`), `mlp[f]` that of f channels; both are 0 at width 0 and never fall as the width
  grows. `rest` is paid unless the layer is removed.
  """

  rest: int
  attention: np.ndarray
  mlp: np.ndarray


class Measured(NamedTuple):
  """What the costs of latency are of, as in `latency.Table`: the request, and where it was measured."""

  request: dict[str, int]
  where: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
  """The cost of every model that pruning can make of one: fixed + Σ over layers of `LayerCost`.

  kind: a name in `UNITS`, that of the target. fixed: what lies outside the layers, such as the embedding.
  dense: the cost of the model before pruning, which fractions refer to. measured: of a latency. removes: the
  unit of attention.
  """

  kind: str
  fixed: int
  layers: tuple[LayerCost, ...]
  dense: int
  measured: Measured | None = None
  removes: AttentionUnit = KV_GROUPS

  @classmethod
  def of(
    cls,
    kind: str,
    config: ModelConfig,
    fixed: int,
    layer_cost: Callable[[LayerShape], LayerCost],
    unit: AttentionUnit = KV_GROUPS,
  ) -> 'Budget':
    """The budget of a model, from the cost of a layer of each shape."""
    found = {shape: layer_cost(shape) for shape in dict.fromkeys(config.layers)}
    layers = tuple(found[shape] for shape in config.layers)
    dense = fixed + sum(int(c.rest + c.attention[-1] + c.mlp[-1]) for c in layers)
    return cls(kind, fixed, layers, dense, removes=unit)

  @property
  def unit(self) -> Unit:
    return UNITS[self.kind]

  @property
  def counts_mlp(self) -> bool:
    """Whether MLP channels cost anything; if not, only attention is pruned."""
    return any(layer.mlp[-1] for layer in self.layers)

  @property
  def coarse(self) -> bool:
    """Whether a unit of attention costs more than all channels of its layer, not in parameters.

    Then a target is missed by up to a group, since too many channels would have to go instead of one.
    """
    return self.kind != 'params' and any(layer.attention[1] > layer.mlp[-1] for layer in self.layers)

  def mean_costs(self, block: str) -> np.ndarray:
    """The mean cost of one unit ('attention') or channel ('mlp') of each layer, at least 1, float64 [L]."""
    costs = [getattr(layer, block) for layer in self.layers]
    return np.array([max(cost[-1] / (len(cost) - 1), 1) for cost in costs])

  def prunable(self, kv: np.ndarray, ffn: np.ndarray) -> np.ndarray:
    """Cost of the units of attention and MLP channels of every layer at these widths, int [L]."""
    return np.array([c.attention[k] + c.mlp[f] for c, k, f in zip(self.layers, kv, ffn, strict=True)])

  def cost(self, kv: np.ndarray, ffn: np.ndarray) -> int:
    """Cost of the model with these units of attention and channels [L]; a layer with neither is removed."""
    rests = sum(c.rest for c, k, f in zip(self.layers, kv, ffn, strict=True) if k or f)
    return int(self.fixed + rests + self.prunable(kv, ffn).sum())

  def digest(self) -> str:
    """A digest of all costs."""
    found = hashlib.sha256(str(self.fixed).encode())
    for layer in self.layers:
      found.update(str(layer.rest).encode() + layer.attention.tobytes() + layer.mlp.tobytes())
    return found.hexdigest()

  def target(self, asked: Target | float | str) -> int:
    """The highest cost that a value of `prune.target` allows."""
    asked = parse(asked)
    if asked.share:
      return int(self.dense * asked.value)
    if asked.kind == 'decode' and self.measured:  # tokens a second, of all rows of the batch together
      return int(1000 * self.measured.request['batch'] / asked.value * self.unit.parts)
    return int(asked.value * self.unit.parts)

  def number(self, cost: int) -> float:
    """A cost in the unit: whole, except in ms and MB."""
    return cost if self.unit.parts == 1 else cost / self.unit.parts

  def text(self, cost: int) -> str:
    """A cost for readers, such as '110,602,944 parameters' or '812.5 ms'."""
    return f'{amount(self.kind, self.number(cost))} {self.unit.name}'


def _linear(rest: int, group: int, channel: int, shape: LayerShape, unit: AttentionUnit) -> LayerCost:
  """The cost of a layer whose units of attention all cost the same, and whose channels do."""
  return LayerCost(rest, group * np.arange(unit.count(shape) + 1), channel * np.arange(shape.ffn + 1))


def params(config: ModelConfig, unit: AttentionUnit = KV_GROUPS) -> Budget:
  """Stored parameters; a tied embedding counts once."""
  channel = channel_params(config)

  def of_layer(shape: LayerShape) -> LayerCost:
    group = unit.params(config, shape)
    rest = layer_params(config, shape) - unit.count(shape) * group - shape.ffn * channel
    return _linear(rest, group, channel, shape, unit)

  tables = count_params(config) - sum(layer_params(config, shape) for shape in config.layers)
  return Budget.of('params', config, tables, of_layer, unit)


def flops(config: ModelConfig, length: int, unit: AttentionUnit = KV_GROUPS) -> Budget:
  """Floating-point operations of a forward pass per token: two per weight of every product, and attention.

  The products of queries with keys and of weights with values cost 4 · T · N · H per layer for T = `length`
  positions, and half of it with causal masks. Norms, rotations and softmax are not counted.
  """
  D, H = config.hidden_size, config.head_dim

  def of_layer(shape: LayerShape) -> LayerCost:
    kv_head, head = 4 * H * D, 4 * H * D + 2 * length * H
    rest = 4 * D * D if config.sliced_from else 0
    if unit is KV_GROUPS:
      return _linear(rest, kv_head + shape.group_size * head, 6 * D, shape, unit)
    return _linear(rest + shape.num_kv_heads * kv_head, shape.num_kv_heads * head, 6 * D, shape, unit)

  return Budget.of('flops', config, 2 * config.vocab_size * D, of_layer, unit)


def kv_cache(config: ModelConfig, itemsize: int) -> Budget:
  """Bytes of the KV cache for one token: a key and a value of H numbers for each KV group of each layer."""
  group = 2 * config.head_dim * itemsize
  return Budget.of('kv_cache', config, 0, lambda shape: _linear(0, group, 0, shape, KV_GROUPS))


def memory(config: ModelConfig, itemsize: int, tokens: int, unit: AttentionUnit = KV_GROUPS) -> Budget:
  """Bytes of the weights, and of the KV cache of so many tokens."""
  weights, cache = params(config, unit), 2 * config.head_dim * itemsize * tokens

  def of_layer(shape: LayerShape) -> LayerCost:
    found = weights.layers[config.layers.index(shape)]
    rest, attention, mlp = itemsize * found.rest, itemsize * found.attention, itemsize * found.mlp
    if unit is KV_GROUPS:
      return LayerCost(rest, attention + cache * np.arange(shape.num_kv_heads + 1), mlp)
    return LayerCost(rest + cache * shape.num_kv_heads, attention, mlp)

  return Budget.of('memory', config, itemsize * weights.fixed, of_layer, unit)
