"""The units of `prune.budget`, by its name, for options, pruning and reports."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Unit:
  """A unit, and the whole numbers that costs are counted in.

  parts: how many of these numbers make one unit. counted: what progress counts, of `counted_parts` each.
  """

  name: str
  counted: str
  parts: int = 1
  counted_parts: int = 1


UNITS = {
  'params': Unit('parameters', 'parameters'),
  'flops': Unit('operations per token', 'operations'),
  'kv_cache': Unit('bytes of KV cache per token', 'bytes'),
  'memory': Unit('bytes', 'bytes'),
  'latency': Unit('ms', 'µs', 10**9, 10**6),  # of picoseconds
}


def amount(kind: str, value: float) -> str:
  """A number in the unit of a budget, for readers: whole, or ms to four digits."""
  return f'{value:,.0f}' if UNITS[kind].parts == 1 or value >= 1000 else f'{value:.4g}'
