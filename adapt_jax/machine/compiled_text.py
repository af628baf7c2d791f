"""What a compiled program reads, writes and sends between devices, from the text of its HLO module."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from typing import NamedTuple

_EXCHANGES = ('all-to-all', 'ragged-all-to-all', 'collective-permute')
_KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', *_EXCHANGES)
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
# NAME = SHAPE OPERATION(OPERANDS), ATTRIBUTES
_INSTRUCTION = re.compile(r'\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_CALLED = re.compile(r'(body|calls|to_apply|branch_computations|true_computation|false_computation)='
                     r'(?:\{(.*?)\}|%?([\w.-]+))')  # fmt: skip
_TRIPS = re.compile(r'known_trip_count\W+n\W+(\d+)')
_CONDITION = re.compile(r'condition=%?([\w.-]+)')
_INDEX = re.compile(r'index=(\d+)')
# Operations that run the computations that they call once; others run them for each element.
_RUNS = ('while', 'conditional', 'call', 'async-start')
_MOVES_NOTHING = (
  'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast', 'after-all', 'partition-id',
  'opt-barrier', 'add-dependency', *_RUNS,
)  # fmt: skip
_SLICES = ('dynamic-slice', 'slice', 'gather')  # read as much of their first operand as they write
_CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')
_KERNELS = re.compile(r'dim_labels=\w+_(\w+)->')
# Of GPUs' solvers on matrices of n rows: operations for each number of the result, in n.
_SOLVERS = {'potrf': 1 / 3, 'getrf': 2 / 3, 'triangularSolve': 1.0}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One operation that sends data between devices.

  Attributes:
    kind: such as `all-gather`.
    shape: of its largest array on one device, such as `bf16[128256,4096]`.
    bytes: of the whole arrays on one device, all together: what an all-gather gives, a reduce-scatter takes.
    devices: how many exchange their data.
    times: how often one run of the program executes it.
  """

  kind: str
  shape: str
  bytes: int
  devices: int
  times: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends in one execution.

    Of n devices each sends (n - 1) / n of the whole arrays; in an all-reduce twice that, in a
    collective-permute all.
    """
    others = (self.devices - 1) / self.devices
    return self.bytes * {'all-reduce': 2 * others, 'collective-permute': 1.0}.get(self.kind, others)


class Kernel(NamedTuple):
  """One operation of the program that computes or moves data while no other one does.

  Attributes:
    times: how often one run of the program executes it.
    flops: floating-point operations of its products. exact: of those in float32 at full precision, and of
      solvers. Attention kernels count none.
    bytes: that it reads from and writes to the device's memory.
  """

  times: int
  flops: float
  exact: float
  bytes: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  operation: str
  rest: str  # operands and attributes
  root: bool

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.-]+)', self.rest.split('), ')[0])

  @functools.cached_property
  def called(self) -> list[str]:
    found = [several or one for _, several, one in _CALLED.findall(self.rest)]
    return [name.strip(' %') for names in found for name in names.split(',')]


class CompiledText:
  """The text of a compiled program (`compiled.as_text()`), for one device.

  A loop of unknown length counts as one round, and every branch of a condition counts.
  """

  def __init__(self, text: str):
    self._computations = defaultdict[str, dict[str, _Instruction]](dict)
    entry = name = ''
    for line in text.splitlines():
      if start := _COMPUTATION.match(line):
        name = start[2]
        entry = name if start[1] else entry
      elif found := _INSTRUCTION.match(line):
        root, instruction, shape, operation, rest = found.groups()
        computation = self._computations[name]
        computation[instruction] = _Instruction(instruction, shape, operation, rest, bool(root))
    partitions = re.search(r'num_partitions=(\d+)', text)
    self._partitions = int(partitions[1]) if partitions else 1
    self._users: dict[str, dict[str, list[_Instruction]]] = {}
    for name, computation in self._computations.items():
      self._users[name] = defaultdict[str, list[_Instruction]](list)
      for x in computation.values():
        for operand in x.operands:
          self._users[name][operand].append(x)
    self._times = defaultdict[str, int](int)
    self._count(entry, 1)

  def _count(self, name: str, rounds: int) -> None:
    self._times[name] += rounds
    for x in self._computations[name].values():
      if x.operation in _RUNS:
        trips = self._trips(x) if x.operation == 'while' else 1
        for called in x.called:
          self._count(called, rounds * trips)

  def _trips(self, loop: _Instruction) -> int:
    """Rounds of a loop that counts from 0, by XLA's note or, without one as on TPUs, by its condition."""
    if noted := _TRIPS.search(loop.rest):
      return int(noted[1])
    named = _CONDITION.search(loop.rest)
    condition = self._computations[named[1]] if named else {}
    for x in condition.values():
      if x.root and x.operation == 'compare' and 'direction=LT' in x.rest:
        counter, bound = (condition.get(name) for name in x.operands)
        if counter and bound and bound.operation == 'constant' and (index := _INDEX.search(counter.rest)):
          return max(-(-_value(bound) // self._step(loop.called[0], int(index[1]))), 1)
    return 1

  def _step(self, body: str, index: int) -> int:
    """What a loop's body adds to its counter, an element of the tuple that it returns."""
    computation = self._computations[body]
    root = next((x for x in computation.values() if x.root and x.operation == 'tuple'), None)
    counter = computation.get(root.operands[index]) if root and index < len(root.operands) else None
    if counter and counter.operation == 'add':
      for name in counter.operands:
        if (added := computation.get(name)) and added.operation == 'constant':
          return max(_value(added), 1)
    return 1

  def collectives(self) -> list[Collective]:
    """All collective operations of the program."""
    found = []
    for name, times in self._times.items():
      for x in self._computations[name].values():
        kind = x.operation.removesuffix('-start')  # of an asynchronous pair, only the start counts
        if kind in _KINDS:
          taken, given = self._exchanged(x, name, on_chip=True)
          shapes = [x.shape, *(y.shape for y in self._operands(x, name))]
          shape = max((_size(*y[:2]), f'{y[0]}[{y[1]}]') for y in _ARRAY.findall(' '.join(shapes)))[1]
          group = _group_size(x.rest) or self._partitions
          found.append(Collective(kind, shape, max(taken, given), group, times))
    return found

  def _exchanged(self, x: _Instruction, computation: str, on_chip: bool = False) -> tuple[int, int]:
    """Bytes that a collective takes and gives.

    The result of an asynchronous one is a tuple of its operands and of what it gives, except for all-reduce.
    """
    taken = sum(_bytes(y.shape, on_chip) for y in self._operands(x, computation))
    given = _bytes(x.shape, on_chip)
    named = x.operation.endswith('-start') and x.operation != 'all-reduce-start'
    return taken, given - taken if named else given

  def _operands(self, x: _Instruction, computation: str) -> list[_Instruction]:
    inside = self._computations[computation]
    return [inside[name] for name in x.operands if name in inside]

  def kernels(self) -> list[Kernel]:
    """What the device executes one after another: all but asynchronous operations and collectives.

    A convolution, as TPUs compute products, counts as if it read one position: at most too little.
    """
    found = []
    for name, times in self._times.items():
      for x in self._computations[name].values():
        if x.operation.removesuffix('-start') in _KINDS or x.operation.endswith('-start'):
          continue
        flops, exact, moved = *self._work(x, name), self._moved(x, name)
        if flops or exact or moved:
          found.append(Kernel(times, flops, exact, moved))
    return found

  def _work(self, x: _Instruction, computation: str) -> tuple[float, float]:
    """Operations of products: those that may use tensor cores, and those in float32 at full precision."""
    if x.operation == 'fusion' and x.called:
      inside = [self._work(y, x.called[0]) for y in self._computations[x.called[0]].values()]
      return sum(flops for flops, _ in inside), sum(exact for _, exact in inside)
    operands = self._operands(x, computation)
    if x.operation in ('dot', 'convolution') and len(operands) == 2:
      work = 2.0 * math.prod(_dims(x.shape)) * _terms(x, *(_dims(y.shape) for y in operands))
      return (0.0, work) if 'operand_precision={highest' in x.rest else (work, 0.0)
    if x.operation == 'custom-call' and operands:
      for name, share in _SOLVERS.items():
        if name in x.rest.partition('custom_call_target=')[2].partition(',')[0]:
          return 0.0, share * math.prod(_dims(x.shape)) * _dims(operands[0].shape)[-1]
    return 0.0, 0.0

  def bytes_moved(self) -> int:
    """Bytes that all operations read from and write to the device's memory.

    Each operation of the optimised program reads its operands and writes its result once. Of an operand of
    which it uses only a slice, it reads the slice; of a result that it updates in place, it writes the
    update. Caches are not considered.
    """
    return sum(
      times * self._moved(x, name)
      for name, times in self._times.items()
      for x in self._computations[name].values()
    )

  def _moved(self, x: _Instruction, computation: str) -> int:
    if x.operation in _MOVES_NOTHING or x.operation.endswith('-done'):
      return 0
    operands = self._operands(x, computation)
    if x.operation == 'fusion' and x.called:
      return self._moved_by_fusion(x, operands)
    if x.operation.removesuffix('-start') in _KINDS:
      return sum(self._exchanged(x, computation))
    if x.operation in _SLICES:
      return _bytes(x.shape) + _read_slice(x.shape, operands)
    if x.operation in ('copy-start', 'slice-start'):  # the result begins with what is written
      written = _ARRAY.search(x.shape)
      return _bytes(written[0]) + _read_slice(written[0], operands) if written else 0
    if x.operation == 'dynamic-update-slice':
      return 2 * _bytes(operands[1].shape)
    return _bytes(x.shape) + sum(_bytes(y.shape) for y in operands)

  def _moved_by_fusion(self, x: _Instruction, operands: list[_Instruction]) -> int:
    name = x.called[0]
    inside = self._computations[name]
    moved = _bytes(x.shape)
    for y in inside.values():
      if y.operation == 'dynamic-update-slice' and self._reaches_root(y, name):
        moved -= _bytes(y.shape) - _bytes(inside[y.operands[1]].shape)
    for index, parameter in self._parameters(name).items():
      if index < len(operands):
        moved += min(_bytes(operands[index].shape), self._read(parameter, name))
    return max(moved, 0)

  def _parameters(self, computation: str) -> dict[int, _Instruction]:
    found = self._computations[computation].values()
    return {_value(x): x for x in found if x.operation == 'parameter'}

  def _read(self, x: _Instruction, computation: str) -> int:
    """Bytes that the users of x inside a fusion read of it, and those in fusions inside that one."""
    total = 0
    for user in self._users[computation][x.name]:
      first = user.operands[0] == x.name
      if user.operation == 'bitcast':
        total += self._read(user, computation)
      elif user.operation == 'fusion' and user.called:
        inner = self._parameters(user.called[0]).get(user.operands.index(x.name))
        total += self._read(inner, user.called[0]) if inner else _bytes(x.shape)
      elif user.operation in _SLICES and first:
        total += _bytes(user.shape)
      elif user.operation == 'dynamic-update-slice' and first:
        continue
      else:
        return _bytes(x.shape)
    return total

  def _reaches_root(self, x: _Instruction, computation: str) -> bool:
    return x.root or any(
      y.operation in ('bitcast', 'tuple') and self._reaches_root(y, computation)
      for y in self._users[computation][x.name]
    )


def _group_size(attributes: str) -> int:
  """How many devices exchange their data in a collective; 0 if its text names no groups."""
  if named := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', attributes):
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", named[2]))
  if tiled := re.search(r'replica_groups=\[(?:\d+,)*(\d+)\]<=', attributes):
    return int(tiled[1])
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', attributes):
    return listed[1].count(',') + 1
  return 0


def _terms(x: _Instruction, left: list[int], right: list[int]) -> int:
  """How many products are added for each number of a dot's or convolution's result."""
  if named := _CONTRACTED.search(x.rest):
    return math.prod(left[int(i)] for i in named[1].split(',') if i)
  if labels := _KERNELS.search(x.rest):
    return right[labels[1].index('i')]
  return 0


def _dims(shape: str) -> list[int]:
  """The sizes of the first array of a shape."""
  found = _ARRAY.search(shape)
  return [int(n) for n in found[2].split(',') if n] if found else []


def _read_slice(slice_shape: str, operands: list[_Instruction]) -> int:
  """Bytes that an operation reads of its first operand, if it reads as much as this shape."""
  in_memory = not operands or 'S(1)' not in operands[0].shape
  return _bytes(slice_shape, on_chip=True) if in_memory else 0


def _value(x: _Instruction) -> int:
  """The whole number that a constant or parameter has in brackets; 0 for another constant."""
  text = x.rest.split(')')[0]
  return int(text) if text.isdigit() else 0


def _bytes(shape: str, on_chip: bool = False) -> int:
  """Bytes of all arrays of a shape in the device's memory; with `on_chip` also of those in VMEM, S(1)."""
  found = _ARRAY.findall(shape)
  return sum(_size(dtype, dims) for dtype, dims, layout in found if on_chip or 'S(1)' not in layout)


def _size(dtype: str, dims: str) -> int:
  bits = re.search(r'\d+', dtype)  # pred has none
  return math.prod(int(n) for n in dims.split(',') if n) * max(int(bits[0]) if bits else 8, 8) // 8
