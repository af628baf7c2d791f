"""Seconds of a request by the widths of the layers: measured by mode bench, or by the roofline of a device.

A request is a batch of prompts of which every row generates some tokens, as in mode bench. Its latency is one
prefill and a decoding step for each new token after the first. Both are taken to be a sum over blocks, each
linear between the widths that were measured.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from adapt_jax.config.mode_options import BenchOptions
from adapt_jax.config.units import UNITS
from adapt_jax.machine.targets import TARGETS
from adapt_jax.models.config import LayerShape, ModelConfig
from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import local
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS, UNITS_BY_NAME, AttentionUnit
from adapt_jax.pruning.budget import Budget, LayerCost, Measured

FIELD = 'prune.latency_table'
DEVICES = tuple(name for name in TARGETS if name != 'cpu')
_PARTS_PER_SECOND = 1000 * UNITS['latency'].parts
_MOST_PARTS = 2**53  # of a request: two and a half hours, up to which they are exact as floats
_BYTES = 2  # of a number in bfloat16, which the published peaks are for


@dataclasses.dataclass(frozen=True)
class Curve:
  """Seconds of a block at some widths, ascending; linear in between, and below the first."""

  widths: tuple[int, ...]
  seconds: tuple[float, ...]

  def at(self, most: int) -> np.ndarray:
    """Seconds at the widths 0 … most, [most + 1]."""
    x, y = np.array(self.widths, float), np.array(self.seconds)
    slope = (y[1] - y[0]) / (x[1] - x[0]) if len(x) > 1 else 0.0
    return np.interp(np.arange(most + 1), [0.0, *x], [y[0] - slope * x[0], *y])


@dataclasses.dataclass(frozen=True)
class Phase:
  """Seconds of a prefill or a decoding step: outside the layers, and of the blocks of each layer.

  rest: of a layer besides what changes with the widths. attention: by units of attention.
  """

  fixed: float
  rest: float
  attention: Curve
  mlp: Curve


@dataclasses.dataclass(frozen=True)
class Table:
  """Latencies of models that differ from one in the widths of layers only.

  name: the file or device. model: what the models have in common, as in `likeness`. request: batch,
  prompt_length and new_tokens. where: the device, backend and dtype of the measurements; empty if none.
  unit: the unit of attention.
  """

  name: str
  model: dict[str, int]
  request: dict[str, int]
  prefill: Phase
  decode: Phase
  where: dict[str, str] = dataclasses.field(default_factory=dict)
  unit: AttentionUnit = KV_GROUPS


# What removing a unit of attention leaves as it is: a field of a layer, and its name.
_KEPT = {KV_GROUPS: ('group_size', QUERY_HEADS.title), QUERY_HEADS: ('num_kv_heads', KV_GROUPS.title)}


def likeness(config: ModelConfig, unit: AttentionUnit = KV_GROUPS) -> dict[str, int]:
  """What two models need to share for a layer of one to be as fast as an equal layer of the other."""
  kept = _KEPT[unit][0]
  return {
    'hidden_size': config.hidden_size,
    'head_dim': config.head_dim,
    kept: getattr(config.layers[0], kept),
    'vocab_size': config.vocab_size,
  }


def here(dtype: Any) -> dict[str, str]:
  """The device, backend and dtype of programs of this process, as in `Table.where`."""
  device = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  return {'device': device, 'backend': jax.default_backend(), 'dtype': np.dtype(dtype).name}


def request_of(options: BenchOptions) -> dict[str, int]:
  """The request of the options, as in `Table.request`."""
  return {name: getattr(options, name) for name in ('batch', 'prompt_length', 'new_tokens')}


def budget(table: Table, config: ModelConfig, kind: str = 'latency') -> Budget:
  """The budget of a request's latency on this model, or of a decoding step if `kind` is decode.

  Raises InputError if the table says nothing of it.
  """
  once, steps = (1, table.request['new_tokens'] - 1) if kind == 'latency' else (0, 1)

  def seconds(of: str, most: int) -> np.ndarray:
    prefill, decode = (getattr(phase, of).at(most) for phase in (table.prefill, table.decode))
    return once * prefill + steps * decode

  def of_layer(shape: LayerShape) -> LayerCost:
    attention, mlp = seconds('attention', table.unit.count(shape)), seconds('mlp', shape.ffn)
    rest = once * table.prefill.rest + steps * table.decode.rest + attention[0] + mlp[0]
    # A wider block that was measured as faster is taken to be as slow: a removal must never cost time.
    return LayerCost(int(_parts(rest)), *(_parts(np.maximum.accumulate(x - x[0])) for x in (attention, mlp)))

  with np.errstate(all='ignore'):  # of numbers out of range, which `_parts` bounds
    fixed = int(_parts(once * table.prefill.fixed + steps * table.decode.fixed))
    found = Budget.of(kind, config, fixed, of_layer, table.unit)
  if not found.counts_mlp or not 0 < found.dense < _MOST_PARTS:
    raise InputError(
      f'{FIELD} = {table.name!r}: narrower layers are no faster in it, or its times are out of '
      f'range: measure on an idle machine'
    )
  return dataclasses.replace(found, measured=Measured(table.request, table.where))


def _parts(seconds: Any) -> Any:
  """Whole picoseconds, int64; what is no number or out of range becomes `_MOST_PARTS`."""
  parts = np.rint(np.asarray(seconds, np.float64) * _PARTS_PER_SECOND)
  return np.where(np.abs(parts) < _MOST_PARTS, parts, _MOST_PARTS).astype(np.int64)


def find_table(
  name: str, config: ModelConfig, request: BenchOptions, unit: AttentionUnit = KV_GROUPS, auto: bool = False
) -> Table:
  """The table of prune.latency_table: of a named device, or a file that mode bench has written.

  auto: whether a file's unit of attention takes the place of `unit`, if the model's layers suit it.

  Raises InputError for a file without a table, for one of another model or unit of attention, and for a model
  whose layers differ in the number of query heads per KV head (or of KV heads, if query heads are pruned).
  """
  table = None if name in DEVICES else _read(name)
  if table and auto and len(_kept_counts(config, table.unit)) == 1:
    unit = table.unit
  if len(counts := _kept_counts(config, unit)) > 1:
    raise InputError(
      f'{FIELD} needs as many {_KEPT[unit][1]} in every layer, but model.source has {sorted(counts)}: choose '
      f'a prune.target in another unit'
    )
  if table and (difference := _difference(table, config, unit)):
    raise InputError(f'{FIELD} = {name!r} {difference}: measure model.source with --mode=bench')
  return table or roofline(name, config, request, unit)


def _difference(table: Table, config: ModelConfig, unit: AttentionUnit) -> str:
  """Why the table says nothing of this model, in words; '' if it does."""
  if table.unit is not unit:
    return f'has times by {table.unit.title}, but prune.attention means {unit.name}'
  for field, ours in likeness(config, unit).items():
    if (theirs := table.model.get(field)) != ours:
      return f'is of a model with {field} {theirs}, but model.source has {ours:,}'
  most = {unit.title: (table.prefill.attention, max(map(unit.count, config.layers)))}
  most['MLP channels'] = table.prefill.mlp, max(shape.ffn for shape in config.layers)
  for title, (curve, width) in most.items():
    if width > curve.widths[-1]:
      return f'goes up to {curve.widths[-1]:,} {title}, but model.source has {width:,}'
  return ''


def _kept_counts(config: ModelConfig, unit: AttentionUnit) -> set[int]:
  """What layers have of what the unit leaves as it is."""
  return {getattr(shape, _KEPT[unit][0]) for shape in config.layers}


def _read(name: str) -> Table:
  remedy = f'name the report.json that --mode=bench wrote for a dense model, or one of {", ".join(DEVICES)}'
  with reading(FIELD, repr(name), remedy):
    report = json.loads(pathlib.Path(local(name)).read_text())
    table = report['latency']
    request = {key: int(np.int64(table['request'][key])) for key in request_of(BenchOptions())}
    if min(request.values()) < 1:
      raise ValueError('its request has a number below 1')
    model = {key: int(value) for key, value in table['model'].items()}
    where = {key: str(report[key]) for key in ('device', 'backend', 'dtype')}
    prefill, decode = _phase(table['prefill']), _phase(table['decode'])
    return Table(name, model, request, prefill, decode, where, UNITS_BY_NAME[table['unit']])


def _phase(table: dict[str, Any]) -> Phase:
  """A phase from JSON."""

  def curve(block: str) -> Curve:
    points = zip(table[block]['widths'], table[block]['seconds'], strict=True)
    # int64 raises OverflowError for numbers that no float holds.
    widths, seconds = zip(*sorted((int(np.int64(width)), float(time)) for width, time in points), strict=True)
    if widths[0] < 1 or len({*widths}) < len(widths):
      raise ValueError(f'{block} has a width twice, or below 1')
    return Curve(widths, seconds)

  return Phase(float(table['fixed']), float(table['rest']), curve('attention'), curve('mlp'))


def roofline(name: str, config: ModelConfig, request: BenchOptions, unit: AttentionUnit = KV_GROUPS) -> Table:
  """A table from published peaks: a block takes the longer of its products and its reads.

  The model is that of Williams et al., 10.1145/1498765.1498785.

  All in bfloat16, on one device, without norms, rotations and the time to start kernels. The cache is read as
  it is half-way through the decoding.
  """
  target, D, H, shape = TARGETS[name], config.hidden_size, config.head_dim, config.layers[0]
  B, P = request.batch, request.prompt_length
  widest = max(unit.count(s) for s in config.layers), max(s.ffn for s in config.layers)
  peaks = np.array([target.peak_tflops * 1e12, target.memory_gb_per_s * 1e9])

  def work(operations: float, numbers: float) -> np.ndarray:
    """Operations, and bytes that are read or written."""
    return np.array([operations, _BYTES * numbers])

  def seconds(work: np.ndarray) -> float:
    return float((work / peaks).max())

  def phase(tokens: int, slots: float) -> Phase:
    """A pass over so many tokens of every row, each of which attends to so many slots."""
    rows, H2D = B * tokens, 2 * H * D
    kv_head = work(2 * H2D * rows, H2D + 2 * H * B * (P if tokens > 1 else slots))
    head = work((2 * H2D + 4 * slots * H) * rows, H2D)
    by_groups = unit is KV_GROUPS
    attention = kv_head + shape.group_size * head if by_groups else shape.num_kv_heads * head
    rest = 0 * kv_head if by_groups else shape.num_kv_heads * kv_head
    curves = [
      Curve((1, width + 1), (seconds(of), (width + 1) * seconds(of)))
      for of, width in zip((attention, work(6 * D * rows, 3 * D)), widest, strict=True)
    ]
    vocabulary = work(2 * config.vocab_size * D * B, config.vocab_size * D)
    return Phase(seconds(vocabulary), seconds(rest), *curves)

  steps = phase(1, P + request.new_tokens / 2)
  return Table(name, likeness(config, unit), request_of(request), phase(P, P / 2), steps, unit=unit)
