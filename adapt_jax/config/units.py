"""Units: of what `prune.target` limits, for options, pruning and reports, and of durations."""

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
  'file': Unit('MB', 'bytes', 10**6),
  'latency': Unit('ms', 'µs', 10**9, 10**6),  # of picoseconds
  'decode': Unit('ms per decoding step', 'ns', 10**9, 10**3),
}


def amount(kind: str, value: float) -> str:
  """A number in the unit of a target, for readers: whole, or ms and MB to four digits."""
  return f'{value:,.0f}' if UNITS[kind].parts == 1 or value >= 1000 else f'{value:.4g}'


def duration(seconds: float) -> str:
  """The duration as text: 40 s, 12 min, 3.5 h; short ones to two digits, such as 0.035 s."""
  if seconds < 9.5:  # from there on two digits are whole seconds
    return f'{seconds:.2g} s'
  if seconds < 90:
    return f'{seconds:.0f} s'
  return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'
