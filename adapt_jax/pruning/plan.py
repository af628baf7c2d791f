"""The groups that a pruning keeps, layer by layer, in the numbering of the original model.

NumPy only.
"""

import dataclasses
from typing import Any, TypedDict

import numpy as np

from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS, AttentionUnit
from adapt_jax.pruning.budget import Budget


class LayerWidths(TypedDict):
  """Query heads, KV heads and MLP channels by layer."""

  num_heads: list[int]
  num_kv_heads: list[int]
  ffn: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class PrunePlan:
  """Masks of kept groups: `kv[l]` over the units of attention of layer l, `ffn[l]` over its channels [F_l].

  `unit` says what the units are: KV groups [K_l], or query heads [G_l] of every KV head. A layer that keeps
  no units and no channels is removed, including its norms.
  """

  kv: tuple[np.ndarray, ...]
  ffn: tuple[np.ndarray, ...]
  unit: AttentionUnit = KV_GROUPS

  @classmethod
  def dense(cls, config: ModelConfig, unit: AttentionUnit = KV_GROUPS) -> 'PrunePlan':
    """The plan that keeps everything."""
    return cls(
      tuple(np.ones(unit.count(s), bool) for s in config.layers),
      tuple(np.ones(s.ffn, bool) for s in config.layers),
      unit,
    )

  @property
  def kv_widths(self) -> np.ndarray:
    """Kept units of attention per layer, int [L]."""
    return np.array([m.sum() for m in self.kv])

  @property
  def ffn_widths(self) -> np.ndarray:
    """Kept MLP channels per layer, int [L]."""
    return np.array([m.sum() for m in self.ffn])

  @property
  def present(self) -> np.ndarray:
    """The layers that are not removed, bool [L]."""
    return (self.kv_widths > 0) | (self.ffn_widths > 0)

  def pruned_config(self, config: ModelConfig) -> ModelConfig:
    """The config of the compacted model, without the removed layers.

    `config` is the original model's, whose numbering the plan uses. Raises InputError if no layer remains,
    or if a remaining layer has no KV groups or no channels.
    """
    widths = list(zip(config.layers, self.kv_widths, self.ffn_widths, strict=True))
    return config.with_layers(
      tuple(
        self.unit.narrowed(s, int(k), int(f))
        for (s, k, f), present in zip(widths, self.present, strict=True)
        if present
      )
    )

  def widths(self, config: ModelConfig) -> LayerWidths:
    """num_heads, num_kv_heads and ffn of every layer of the original model `config`; 0 if removed."""
    pairs = zip(config.layers, self.kv_widths.tolist(), strict=True)
    heads, kv_heads = zip(*(self.unit.heads(shape, units) for shape, units in pairs), strict=True)
    return {'num_heads': list(heads), 'num_kv_heads': list(kv_heads), 'ffn': self.ffn_widths.tolist()}

  def without_layer(self, layer: int) -> 'PrunePlan':
    """This plan with one more layer removed."""

    def emptied(masks: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
      return tuple(np.zeros_like(m) if i == layer else m for i, m in enumerate(masks))

    return PrunePlan(emptied(self.kv), emptied(self.ffn), self.unit)

  def params(self, config: ModelConfig) -> int:
    """Stored parameters of the compacted model."""
    return count_params(self.pruned_config(config))

  def cost(self, budget: Budget) -> int:
    """Cost of the compacted model, in the parts of the budget's unit."""
    return budget.cost(self.kv_widths, self.ffn_widths)

  def relative_to(self, earlier: 'PrunePlan') -> 'PrunePlan':
    """This plan in the numbering of the model compacted to `earlier`, without the layers removed there."""

    def renumber(now: tuple[np.ndarray, ...], then: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
      if any(np.any(n & ~t) for n, t in zip(now, then, strict=True)):
        raise ValueError('a later plan cannot keep what an earlier one removed')
      return tuple(n[t] for n, t, there in zip(now, then, earlier.present, strict=True) if there)

    return PrunePlan(renumber(self.kv, earlier.kv), renumber(self.ffn, earlier.ffn), self.unit)

  def equals(self, other: 'PrunePlan') -> bool:
    """True if both keep the same groups."""
    return all(map(np.array_equal, self.kv + self.ffn, other.kv + other.ffn))

  def to_json(self) -> dict[str, Any]:
    """{'layers': [{'kv_groups': kept indices, 'ffn_channels': kept indices}, ...]}; both empty if removed.

    With query heads as units, 'query_heads' takes the place of 'kv_groups'.
    """
    return {
      'layers': [
        {self.unit.name: np.flatnonzero(k).tolist(), 'ffn_channels': np.flatnonzero(f).tolist()}
        for k, f in zip(self.kv, self.ffn, strict=True)
      ]
    }

  @classmethod
  def from_json(cls, data: dict[str, Any], config: ModelConfig) -> 'PrunePlan':
    """Reads the result of `to_json`; `config` is the model of the plan."""
    unit = QUERY_HEADS if QUERY_HEADS.name in data['layers'][0] else KV_GROUPS

    def mask(kept: list[int], size: int) -> np.ndarray:
      m = np.zeros(size, bool)
      m[kept] = True
      return m

    pairs = list(zip(data['layers'], config.layers, strict=True))
    return cls(
      tuple(mask(kept[unit.name], unit.count(shape)) for kept, shape in pairs),
      tuple(mask(kept['ffn_channels'], shape.ffn) for kept, shape in pairs),
      unit,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class PruneState:
  """The state of the schedule; one schedule covers all stages.

  plan: the groups kept. sparsity: s_l [L], float64. step: pruning steps since the start of the run.
  """

  plan: PrunePlan
  sparsity: np.ndarray
  step: int

  @classmethod
  def start(cls, config: ModelConfig, unit: AttentionUnit = KV_GROUPS) -> 'PruneState':
    return cls(PrunePlan.dense(config, unit), np.zeros(config.num_layers), 0)

  def to_json(self) -> dict[str, Any]:
    return {'step': self.step, 'sparsity': self.sparsity.tolist()} | self.plan.to_json()

  @classmethod
  def from_json(cls, data: dict[str, Any], config: ModelConfig) -> 'PruneState':
    """Reads the result of `to_json`; `config` is the model of the plan."""
    return cls(PrunePlan.from_json(data, config), np.array(data['sparsity'], np.float64), data['step'])


def keep_best(
  plan: PrunePlan,
  kv_scores: np.ndarray,
  ffn_scores: np.ndarray,
  kv_widths: np.ndarray,
  ffn_widths: np.ndarray,
) -> PrunePlan:
  """Narrows `plan` to the given widths [L], keeping each layer's highest-scored groups.

  Scores are [L, K] and [L, F], padded to the widest layer. Removed groups stay removed, whatever their
  score. Of equal scores the lower index is kept.
  """

  def best(mask: np.ndarray, scores: np.ndarray, width: int) -> np.ndarray:
    kept = np.flatnonzero(mask)
    order = np.argsort(-scores[kept], kind='stable')
    out = np.zeros_like(mask)
    out[kept[order[:width]]] = True
    return out

  return PrunePlan(
    tuple(map(best, plan.kv, kv_scores, kv_widths)),
    tuple(map(best, plan.ffn, ffn_scores, ffn_widths)),
    plan.unit,
  )
