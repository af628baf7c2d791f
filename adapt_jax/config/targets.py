"""What `prune.target` asks for: a share of the dense model, a number of parameters, MB, tokens a second.

NUMBER[UNIT][@TYPE], such as 0.8, 100M, 0.5kv, 12ms, 20tok/s, 600MB or 600MB@q4_k_m
"""

import dataclasses
import math
import re
from typing import Any

from adapt_jax.config.values import GGUF_TYPES
from adapt_jax.models.errors import InputError

Asked = float | str | tuple[float | str, ...]  # the value of prune.target: one size, or several
FORMS = (
  'give a fraction of the parameters (0.8) or their number (100M), 0.5kv, 0.7flops, 0.7memory, 0.7latency, '
  '12ms, 20tok/s, 600MB or 600MB@q4_k_m'
)
# Unit -> what is limited (a name in `config.units.UNITS`), a factor, and whether up to 1 it is a fraction.
_UNITS = {
  '': ('params', 1.0, True),
  'm': ('params', 1e6, False),
  'b': ('params', 1e9, False),
  'kv': ('kv_cache', 1.0, True),
  'flops': ('flops', 1.0, True),
  'memory': ('memory', 1.0, True),
  'latency': ('latency', 1.0, True),
  'ms': ('latency', 1.0, False),
  'mb': ('file', 1.0, False),
  'gb': ('file', 1000.0, False),
  'tok/s': ('decode', 1.0, False),
}
_FORM = re.compile(r'([\d._]+(?:e[+-]?\d+)?)([a-z/]*)(?:@(\w+))?', re.ASCII)
_TYPES = {name.lower(): name for name in GGUF_TYPES}


@dataclasses.dataclass(frozen=True)
class Target:
  """One target.

  text: as it is written. kind: what is limited, a name in `config.units.UNITS`. value: a fraction of the
  dense model's if `share`, otherwise in the unit of the kind; of decode, tokens a second. type: of the GGUF
  file whose bytes count; '' for the weights as exported.
  """

  text: str
  kind: str
  value: float
  share: bool
  type: str = ''

  @property
  def timed(self) -> bool:
    """Whether it needs prune.latency_table."""
    return self.kind in ('latency', 'decode')

  @property
  def name(self) -> str:
    """The name of its directory."""
    return self.text.replace('/', '-')


def parse(asked: Any) -> Target:
  """The target that a number or a text asks for. Raises InputError that shows the forms."""
  if isinstance(asked, Target):
    return asked
  number = isinstance(asked, (int, float)) and not isinstance(asked, bool)
  text = f'{asked:.15g}' if number else asked
  found = _FORM.fullmatch(text.strip().lower()) if isinstance(text, str) else None
  try:
    digits, unit, of = found.groups(default='') if found else ('', '', '')
    kind, factor, may_be_share = _UNITS[unit]
    value, type_ = float(digits) * factor, _TYPES[of] if of else ''
    if not 0 < value < math.inf or (type_ and kind != 'file'):
      raise ValueError
  except (KeyError, ValueError):
    raise InputError(f'prune.target = {asked!r}: {FORMS}') from None
  written = f'{value:.15g}'
  if kind != 'params':
    written = f'{float(digits):.15g}{unit.upper() if kind == "file" else unit}{f"@{of}" if of else ""}'
  return Target(written, kind, value, may_be_share and value <= 1, type_)


def canonical(value: Any) -> Asked | None:
  """One target as a number or a text, several as a tuple, each once; None for anything else.

  Texts with commas are several. Raises InputError.
  """
  parts = value.split(',') if isinstance(value, str) else value
  if not isinstance(parts, (list, tuple)):
    parts = [value]
  if any(isinstance(part, bool) or not isinstance(part, (int, float, str)) for part in parts):
    return None
  found = [parse(part) for part in parts if part != '']
  one = [float(of.value) if of.kind == 'params' else of.text for of in found]
  if not one or len({*one}) < len(one):
    return None
  return one[0] if len(one) == 1 else tuple(one)


def listed(asked: Asked) -> tuple[float | str, ...]:
  """All sizes that a value of prune.target asks for."""
  return asked if isinstance(asked, tuple) else (asked,)
