"""What each layer knows of positions: its rotary tables and the window of its attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.network.rope import rope_tables

_ALL = 2**30  # a window that no row reaches


class Positions(NamedTuple):
  """Positions as one layer uses them.

  cos, sin: rotary tables in fp32, [T, H/2] or [B, T, H/2]; None in a layer without rotary embeddings.
  window: how many tokens a query sees, its own included; None for all before it.
  """

  cos: jax.Array | None
  sin: jax.Array | None
  window: int | jax.Array | None


class PositionTables:
  """The `Positions` of all layers of a model for integer positions [..., T]; layers of a kind share them.

  If the positions are a numpy array, and so known when a program is traced, windows that reach all of them
  are left out.
  """

  def __init__(self, config: ModelConfig, positions: jax.Array | np.ndarray):
    kinds = tuple(dict.fromkeys(map(_kind, config.layers)))
    self._kind_L = [kinds.index(_kind(shape)) for shape in config.layers]
    self._kinds = []
    most = positions.max() if isinstance(positions, np.ndarray) else _ALL
    for window, rotary in kinds:
      rope = config.local_rope if window and config.local_rope else config.rope
      cos, sin = rope_tables(rope, config.head_dim, positions) if rotary else (None, None)
      self._kinds.append(Positions(cos, sin, window if 0 < window <= most else None))

  def of(self, layer: int | jax.Array) -> Positions:
    """The positions of one layer; its index may be traced, as in a scan over layers."""
    if isinstance(layer, int):
      return self._kinds[self._kind_L[layer]]
    if len(self._kinds) == 1:
      return self._kinds[0]
    kind = jnp.asarray(self._kind_L)[layer]
    given: Any = next(p for p in self._kinds if p.cos is not None)
    # Without rotation: an angle of 0.
    cos = jnp.stack([jnp.ones_like(given.cos) if p.cos is None else p.cos for p in self._kinds])
    sin = jnp.stack([jnp.zeros_like(given.sin) if p.sin is None else p.sin for p in self._kinds])
    if not any(p.window for p in self._kinds):
      return Positions(cos[kind], sin[kind], None)
    window = jnp.asarray([p.window or _ALL for p in self._kinds])
    return Positions(cos[kind], sin[kind], window[kind])


def _kind(shape: LayerShape) -> tuple[int, bool]:
  return shape.window, shape.rotary
