"""A .gguf file taken apart and put together again, so that one value of it can be damaged."""

import dataclasses
import struct
from typing import Any

CODES = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
STRING, ARRAY = 8, 9


@dataclasses.dataclass
class Field:
  """A metadata field; of an array, `item` is the type of its values. Strings are bytes."""

  key: bytes
  kind: int
  value: Any
  item: int = 0


@dataclasses.dataclass
class Info:
  """A tensor: its name, its shape (columns first), its type and the offset of its data."""

  name: bytes
  dims: list[int]
  kind: int
  offset: int


@dataclasses.dataclass
class Parts:
  """The fields, the tensors and their data."""

  fields: list[Field]
  infos: list[Info]
  data: bytes

  def field(self, key: str) -> Field:
    return next(field for field in self.fields if field.key == key.encode())


def take_apart(content: bytes) -> Parts:
  """The parts of an undamaged file."""
  at = 8

  def scalar(code: str) -> Any:
    nonlocal at
    at += struct.calcsize('<' + code)
    return struct.unpack_from('<' + code, content, at - struct.calcsize('<' + code))[0]

  def string() -> bytes:
    nonlocal at
    size = scalar('Q')
    at += size
    return content[at - size : at]

  def one(kind: int) -> Any:
    return string() if kind == STRING else scalar(CODES[kind])

  def field() -> Field:
    key, kind = string(), scalar('I')
    if kind != ARRAY:
      return Field(key, kind, one(kind))
    item, count = scalar('I'), scalar('Q')
    return Field(key, kind, [one(item) for _ in range(count)], item)

  tensors, count = scalar('Q'), scalar('Q')
  fields = [field() for _ in range(count)]
  infos = [
    Info(string(), [scalar('Q') for _ in range(scalar('I'))], scalar('I'), scalar('Q'))
    for _ in range(tensors)
  ]
  return Parts(fields, infos, content[at + -at % 32 :])


def put_together(parts: Parts) -> bytes:
  """A file of version 3; numbers that do not fit their type are cut off."""
  found = [b'GGUF', struct.pack('<IQQ', 3, len(parts.infos), len(parts.fields))]
  for field in parts.fields:
    found += [_string(field.key), struct.pack('<I', field.kind)]
    if field.kind == ARRAY:
      found += [struct.pack('<IQ', field.item, len(field.value))]
    values, kind = (field.value, field.item) if field.kind == ARRAY else ([field.value], field.kind)
    found += [_one(kind, value) for value in values]
  for info in parts.infos:
    found += [_string(info.name), struct.pack('<I', len(info.dims))]
    found += [struct.pack('<Q', dim % 2**64) for dim in info.dims]
    found += [struct.pack('<IQ', info.kind % 2**32, info.offset % 2**64)]
  header = b''.join(found)
  return header + bytes(-len(header) % 32) + parts.data


def _string(value: bytes) -> bytes:
  return struct.pack('<Q', len(value)) + value


def _one(kind: int, value: Any) -> bytes:
  if kind == STRING:
    return _string(value if isinstance(value, bytes) else str(value).encode('utf-8', 'surrogatepass'))
  code = CODES.get(kind, 'I')
  if isinstance(value, bytes) or value is None:
    value = len(value or b'')
  if code not in 'fd?':
    value = int(value) if abs(value) < float('inf') else 0  # also of NaN
    size = 8 * struct.calcsize('<' + code)
    value %= 2**size
    if code.islower() and value >= 2 ** (size - 1):
      value -= 2**size
  elif code == 'f' and abs(value) > 3e38:
    value = float('inf')
  return struct.pack('<' + code, value)
