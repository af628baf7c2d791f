"""Texts and token blocks, one file of each type that is read, and a chat template of the user."""

import json
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from adapt_jax.config.options import DataOptions
from adapt_jax.data.chat_templates import with_template
from adapt_jax.data.documents import check_source, fingerprint, is_blocks, read_documents
from adapt_jax.data.tokenise import encode_prompts
from adapt_jax.data.windows import check_vocab, load_blocks
from tests.fuzz.cases import Kind, Values, digest
from tests.fuzz.mutations import damage_bytes, damage_json, damage_template, json_text, replace_file
from tests.support.tokenizers_for_tests import CHATML_DEFAULT_SYSTEM, tiny_tokenizer

_TOKENIZER = tiny_tokenizer(CHATML_DEFAULT_SYSTEM)
_FIELD, _LENGTH = 'train.source', 8
_FIELDS = {'text_field': DataOptions().text_field, 'messages_field': DataOptions().messages_field}
_LINE = 'It was the best of times, it was the worst of times: déjà vu, 你好, 🙂.'
_CHAT = [{'role': 'user', 'content': 'hello'}, {'role': 'assistant', 'content': 'the sum is five'}]
_ROWS: list[dict[str, Any]] = [
  {'text': _LINE},
  {'text': 'The dog sleeps on.', 'id': 7},
  {'messages': _CHAT},
  {'conversations': [{'from': 'human', 'value': 'two and three?'}, {'from': 'gpt', 'value': 'five'}]},
  {'question': 'who?', 'response': 'the fox', 'system_prompt': 'be terse'},
  {'instruction': 'jump', 'input': 'over it', 'output': 'the lazy dog jumps'},
  {'text': ''},
]


def _parquet(place: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  parquet.write_table(pyarrow.Table.from_pylist(rows), place)


_WRITE: dict[str, Callable[[pathlib.Path], None]] = {
  'txt': lambda path: path.write_bytes(f'{_LINE}\r\n\n{_LINE}\n'.encode()) and None,
  'jsonl': lambda path: path.write_text('\n'.join(map(json.dumps, _ROWS)) + '\n') and None,
  'json': lambda path: path.write_text(json.dumps(_ROWS)) and None,
  'parquet': lambda path: _parquet(path, [{'text': f'{i} {_LINE}', 'n': i} for i in range(20)]),
  'npy': lambda path: np.save(path, np.arange(80, dtype=np.uint16).reshape(10, _LENGTH)),
  'jinja': lambda path: path.write_text(CHATML_DEFAULT_SYSTEM) and None,
}


class TextFile(Kind):
  """One file of text; its name ends with the name of the kind."""

  def __init__(self, name: str, share: float):
    self.name, self.share = name, share

  def make(self, place: pathlib.Path) -> None:
    _WRITE[self.name](place / f'file.{self.name}')

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    path = place / f'file.{self.name}'
    if rng.random() < 0.06:
      return replace_file(path, rng)
    if rng.random() < 0.03:
      end = rng.choice(['.csv', '.gz', '.TXT', '.jsonl', '.parquet', '.npy', '', '.\udcff'])
      path.rename(path.with_suffix(end))
      return f'named {end!r}'
    if self.name in ('jsonl', 'json') and rng.random() < 0.6:
      rows = damage_json([json.loads(json.dumps(row)) for row in _ROWS], rng)
      lines = self.name == 'jsonl' and isinstance(rows, list)
      path.write_text('\n'.join(map(json_text, rows)) if lines else json_text(rows))
      return 'rows'
    if self.name == 'parquet' and rng.random() < 0.4:
      return _other_table(path, rng)
    if self.name == 'npy' and rng.random() < 0.4:
      np.save(path, _other_array(rng))
      return 'array'
    if self.name == 'jinja' and rng.random() < 0.5:
      path.write_text(damage_template(path.read_text(), rng))
      return 'hostile'
    if rng.random() < 0.02:
      path.write_bytes(path.read_bytes() + b'word ' * 400_000)
      return 'a giant line'
    data = path.read_bytes()
    path.write_bytes(damage_bytes(data, rng, 128 if self.name == 'npy' else None))
    return 'bytes'

  def observe(self, place: pathlib.Path) -> Values:
    if self.name == 'jinja':
      tokenizer = with_template(_TOKENIZER, str(next(iter(place.iterdir()), place / 'file.jinja')))
      return {'prompt': json.dumps(encode_prompts(['the dog'], tokenizer, True)[0])}
    # A name of another type is the user's; one file that is absent is the one that was asked for.
    source = (
      str(next((p for p in sorted(place.iterdir()) if p.name != 'kept'), place / f'file.{self.name}')),
    )
    check_source(source, _FIELD, **_FIELDS)
    found = {}
    if not is_blocks(source):
      fingerprint(source[0], _FIELD)
      documents = [document.content for document in read_documents(source, _FIELD, **_FIELDS)]
      found['documents'] = json.dumps(list(map(digest, documents)))
    blocks = load_blocks(source, _TOKENIZER, _LENGTH, field=_FIELD, **_FIELDS)
    check_vocab(int(blocks.tokens.max()), len(_TOKENIZER), _FIELD)
    assert blocks.tokens.min() >= 0
    return found | {'tokens': digest(blocks.tokens.tobytes(), blocks.targets.tobytes())}

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """No text has a checksum: what is read may be what the file says, decoded here in another way."""
    path = next(p for p in sorted(place.iterdir()) if p.name != 'kept')
    if self.name == 'jinja':
      return {'prompt': ''}
    if path.read_bytes() == (base / f'file.{self.name}').read_bytes() and path.suffix == f'.{self.name}':
      return {}
    expected = None if path.suffix == '.npy' else _said(path)
    return {'tokens': '', 'documents': '' if expected is None else json.dumps(list(map(digest, expected)))}


def _said(path: pathlib.Path) -> list[str] | None:
  """The texts in a file; None if it has other rows than texts."""
  kind = path.suffix.lower()
  if kind == '.parquet':
    with parquet.ParquetFile(path) as file:
      names = file.schema_arrow.names  # other columns are not read, and may be damaged
      rows = file.read(columns=['text'] if 'text' in names else names).to_pylist()
  elif kind in ('.jsonl', '.json'):
    text = path.read_bytes().decode('utf-8-sig')
    whole = kind == '.json' and text.lstrip().startswith('[')
    rows = json.loads(text) if whole else [json.loads(line) for line in text.split('\n') if line.strip()]
  else:
    text = path.read_bytes().decode('utf-8-sig')
    rows = [{'text': text.replace('\r\n', '\n').replace('\r', '\n')}]
  if all(set(row) <= {'text', 'n', 'id'} for row in rows):
    return [row['text'] for row in rows if row['text']]
  return None


def _other_table(path: pathlib.Path, rng: random.Random) -> str:
  """A table with columns of other types, such as dates, nested values, nulls or dictionaries."""
  make: dict[str, Callable[[], Any]] = {
    'timestamps': lambda: pyarrow.array([2**62, -(2**62), 0], pyarrow.timestamp(rng.choice(['us', 'ns']))),
    'zones': lambda: pyarrow.array([0, 1, 2], pyarrow.timestamp('us', tz=rng.choice(['UTC', '+99:99']))),
    'dates': lambda: pyarrow.array([2**31 - 1, 0, -(2**31)], pyarrow.date32()),
    'durations': lambda: pyarrow.array([2**62, 0, 1], pyarrow.duration('s')),
    'bytes': lambda: pyarrow.array([b'\xff\xfe', b'a', None], pyarrow.binary()),
    'numbers': lambda: pyarrow.array([1, None, 3]),
    'nulls': lambda: pyarrow.array([None, None, None]),
    'lists': lambda: pyarrow.array([['a'], [], None]),
    'structs': lambda: pyarrow.array([{'role': 'user', 'content': 'x'}, None, {}]),
    'words': lambda: pyarrow.array(['one two three four five six', 'b', 'c']).dictionary_encode(),
    'large': lambda: pyarrow.array(['one two three four five six', 'b', 'c'], pyarrow.large_string()),
  }
  names = [rng.choice(list(make)) for _ in range(2)]
  titles = rng.choice(
    [['text', 'n'], ['messages', 'text'], ['text', 'text'], ['', 'x'], ['conversations', 'n']]
  )
  parquet.write_table(pyarrow.Table.from_arrays([make[name]() for name in names], titles), path)
  return f'columns {titles} of {names}'


def _other_array(rng: random.Random) -> np.ndarray:
  """An array of another type, another shape, or with ids outside of the vocabulary."""
  found = np.arange(80).reshape(10, _LENGTH)
  kind = rng.choice(['ids', 'shape', 'dtype', 'empty'])
  if kind == 'ids':
    found[rng.randrange(10), rng.randrange(_LENGTH)] = rng.choice([-1, 319, 320, 321, 2**16, 2**31, 2**62])
    return found
  if kind == 'shape':
    return found.reshape(rng.choice([(80,), (5, 16), (8, 10), (10, 8, 1), (1, 80), (2, 5, 8)]))
  if kind == 'empty':
    return found[:0]
  return found.astype(rng.choice(['f4', '>i4', '>u2', '?', 'S1', 'M8[s]', 'c8', 'i1', 'u8', 'U3', 'i4,i4']))


KINDS = tuple(
  TextFile(name, share)
  for name, share in {
    'txt': 0.02,
    'jsonl': 0.04,
    'json': 0.03,
    'parquet': 0.04,
    'npy': 0.03,
    'jinja': 0.02,
  }.items()
)
