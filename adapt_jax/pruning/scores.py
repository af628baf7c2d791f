"""The results of one scoring pass, on the host or on the device."""

from typing import Any, NamedTuple


class Scores(NamedTuple):
  """The arrays of one pass; all padded to the widest layer.

  kv [L, K] and ffn [L, F]: importance of every group; with query heads as the unit of attention, kv is
  [L, G]. distance [L]: mean over tokens of the layer's
  distance between input and output, larger = more change. loss: mean next-token cross-entropy, nats.
  o_columns [L, K, G, H]: scores of o_proj's columns, which `kv` sums, for importances that score columns
  ([L, G, K, H] with query heads as the unit); else None.
  """

  kv: Any
  ffn: Any
  distance: Any
  loss: Any
  o_columns: Any = None
