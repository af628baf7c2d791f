"""What pruning removes from attention as a whole (`prune.attention`): KV groups or query heads.

A KV group is a KV head with all its query heads (paper section 3.1). A unit of query heads has one query head
of every KV head of a layer, that of the same index: all KV heads keep as many, as other programs require.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.models.config import LayerShape, ModelConfig, kv_group_params


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionUnit:
  """A kind of unit.

  name: as in prune.attention and in plans. title: what a layer's width counts, in words.
  axis: its axis among [K, G, H], those of o_proj's columns.
  axes: leaf of attention -> the axis along which its units lie; leaves not named here stay whole.
  """

  name: str
  title: str
  axis: int
  axes: Mapping[str, int]

  def count(self, shape: LayerShape) -> int:
    """Units of a layer: K, or G."""
    return (shape.num_kv_heads, shape.group_size)[self.axis]

  def heads(self, shape: LayerShape, units: int) -> tuple[int, int]:
    """Query heads and KV heads of a layer that keeps so many units."""
    if self is KV_GROUPS:
      return units * shape.group_size, units
    return units * shape.num_kv_heads, shape.num_kv_heads if units else 0

  def narrowed(self, shape: LayerShape, units: int, ffn: int) -> LayerShape:
    """The layer with so many units and MLP channels."""
    num_heads, num_kv_heads = self.heads(shape, units)
    return dataclasses.replace(shape, num_heads=num_heads, num_kv_heads=num_kv_heads, ffn=ffn)

  def params(self, config: ModelConfig, shape: LayerShape) -> int:
    """Stored parameters that are removed with one unit of a layer."""
    if self is KV_GROUPS:
      return kv_group_params(config, shape.group_size)
    return shape.num_kv_heads * (kv_group_params(config, 1) - kv_group_params(config, 0))

  def columns(self, sizes_KGH: tuple[int, ...]) -> np.ndarray:
    """The columns of o_proj, K·G·H in all, that belong to each unit: int [units, columns of one]."""
    indices = np.arange(np.prod(sizes_KGH)).reshape(sizes_KGH)
    return np.moveaxis(indices, self.axis, 0).reshape(sizes_KGH[self.axis], -1)


KV_GROUPS = AttentionUnit(
  'kv_groups', 'KV heads', 0, {'q': 0, 'k': 0, 'v': 0, 'o': 1, 'q_bias': 0, 'k_bias': 0, 'v_bias': 0}
)
QUERY_HEADS = AttentionUnit('query_heads', 'query heads per KV head', 1, {'q': 1, 'o': 2, 'q_bias': 1})
UNITS_BY_NAME = {unit.name: unit for unit in (KV_GROUPS, QUERY_HEADS)}


def find_unit(options: PruneOptions, config: ModelConfig) -> AttentionUnit:
  """The unit for prune.attention and a model.

  auto: query heads if every layer has a single KV head, which cannot go, or if the model has been pruned by
  query heads before; but not for a target of kv, which they do not change.
  """
  if options.attention != 'auto':
    return QUERY_HEADS if options.attention == QUERY_HEADS.name else KV_GROUPS
  kv_heads = {shape.num_kv_heads for shape in config.layers}
  groups = {shape.group_size for shape in config.layers}
  suits = kv_heads == {1} or (len(kv_heads) == 1 and len(groups) > 1)
  return QUERY_HEADS if suits and options.limit.kind != 'kv_cache' else KV_GROUPS
