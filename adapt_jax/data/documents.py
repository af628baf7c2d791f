"""Reads documents from files, directories, globs and hub data sets, one at a time.

A source is a tuple of strings. Each is a file (.txt, .tokens: one document; .jsonl, .json, .parquet: one per
row, of the forms in `adapt_jax.data.records`), a directory (every such file below it, sorted), a glob, or, if
no such path exists, a hub data set `org/name`, `org/name:split` or `org/name:config:split` (split `train` by
default). A source of one .npy file holds token blocks: see `adapt_jax.data.windows`.
"""

import dataclasses
import glob
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from adapt_jax.data import records
from adapt_jax.models.errors import InputError, Unreachable, first_line, reading, unreachable
from adapt_jax.models.files import exists, local, read_text, regular

Source = tuple[str, ...]
Rows = Iterator[tuple[str, dict[str, Any]]]  # where each is, for error messages, and its fields

_WHOLE = ('.txt', '.tokens')  # one document per file; .tokens is the suffix of WikiText's files
_SUFFIXES = (*_WHOLE, '.jsonl', '.json', '.parquet')
_NEVER_HUB = (*_SUFFIXES, '.npy', '.csv', '.gz', '.zst')
_BY_LINE = 'Salesforce/wikitext'  # the data set whose rows are lines
_HEADING = re.compile(r' = [^=](.*[^=])? = \n')
_HUB = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+){0,2}')


@dataclasses.dataclass(frozen=True)
class Document:
  """A plain text, or a conversation still to be rendered with a chat template."""

  where: str  # file and line or row, for error messages
  content: records.Content

  @property
  def size(self) -> int:
    """Characters, without those that a chat template adds."""
    if isinstance(self.content, str):
      return len(self.content)
    return sum(len(message['content']) for message in self.content)


def read_documents(source: Source, field: str, *, text_field: str, messages_field: str) -> Iterator[Document]:
  """Yields the documents of `source` in order, reading only as far as needed; skips empty ones.

  `field` is the name of the config field that holds `source`. Raises InputError for an empty source, a
  missing or unreadable file, a broken row, and a row of no known form.
  """
  for origin in _origins(source, field):
    for document in _documents(origin, text_field, messages_field):
      if document.content:
        yield document


def check_source(source: Source, field: str, *, text_field: str, messages_field: str) -> None:
  """Checks that every file can be opened and that its first row has a known form; tokenises nothing.

  The first row of a hub data set is read over the network. Raises InputError.
  """
  if is_blocks(source):
    open_blocks(source, field)
    return
  for origin in _origins(source, field):
    if isinstance(origin, pathlib.Path) and origin.suffix.lower() in _WHOLE:
      with reading(field, origin), open(regular(origin), 'rb'):
        continue
    next(_documents(origin, text_field, messages_field), None)


def fingerprint(entry: str, field: str) -> list[Any]:
  """Identifies the data of one entry of a source: path, size and modification time of every file.

  For a hub data set: its revision, or '' if the hub does not give it. Raises InputError as reading does.
  """
  marks: list[Any] = []
  for origin in _origins((entry,), field):
    if isinstance(origin, str):
      marks.append((origin, _hub_revision(origin.split(':')[0])))
      continue
    with reading(field, origin):
      status = origin.stat()
      marks.append((str(origin.resolve()), status.st_size, status.st_mtime_ns))
  return marks


def hub_name(entry: str) -> str:
  """The name `org/name` of the hub data set that an entry is written as; '' if it is written as a path."""
  written = _HUB.fullmatch(entry) and pathlib.PurePath(entry).suffix.lower() not in _NEVER_HUB
  return entry.partition(':')[0] if written else ''


def hub_datasets(entries: Iterable[str]) -> tuple[str, ...]:
  """The names of the hub data sets among the entries, each once; an entry that is here as a path is none."""
  names = [hub_name(entry) for entry in entries if not exists(pathlib.Path(entry))]
  return tuple(dict.fromkeys(filter(None, names)))


def _hub_revision(name: str) -> str:
  import huggingface_hub

  try:
    return huggingface_hub.HfApi().dataset_info(name, timeout=10).sha or ''
  except Exception:  # the hub's errors and those of its HTTP library share no other class
    return ''  # offline: reading will show whether the data are available


def is_blocks(source: Source) -> bool:
  """Whether the source is one .npy file of token blocks."""
  return len(source) == 1 and source[0].lower().endswith('.npy')


def open_blocks(source: Source, field: str, length: int = 0) -> np.ndarray:
  """Memory-maps the .npy file of `source`: integers [N, T]. Raises InputError for anything else.

  length: T, if it is known.
  """
  with reading(f'{field} {source[0]!r}', remedy='give a .npy file of integers [rows, sequence length]'):
    blocks: np.ndarray = np.load(regular(local(source[0])), mmap_mode='r', allow_pickle=False)
    if blocks.ndim != 2 or blocks.dtype.kind not in 'iu' or (length and blocks.shape[1] != length):
      raise ValueError(
        f'it holds {blocks.dtype} {list(blocks.shape)}{length and f", not rows of {length}" or ""}'
      )
  return blocks


def _origins(source: Source, field: str) -> Iterator[pathlib.Path | str]:
  """The files (paths) and hub data sets (strings) that the entries refer to."""
  for entry in source or ('',):
    with reading(field, repr(entry), 'check the path'):
      files = [file for path in _matches(entry) for file in _files(path)]
    wrong = [file for file in files if file.suffix.lower() not in _SUFFIXES]
    if not files and hub_name(entry):
      yield entry
    elif wrong or not files:
      raise InputError(
        f'{field} {entry!r}: {"not a text" if wrong else "no such file"}: name {", ".join(_SUFFIXES)} files, '
        'directories or globs of them, a hub data set org/name:config:split, or one .npy file of token ids '
        'alone (make fetch downloads the demo)'
      )
    yield from files


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  """The file itself, or the texts below a directory, sorted."""
  if not path.is_dir():
    return [path]
  return sorted(p for p in path.rglob('*') if p.suffix.lower() in _SUFFIXES and p.is_file())


def _matches(entry: str) -> list[pathlib.Path]:
  """The path that `entry` names, or else those that it matches as a glob, sorted; ** follows no links."""
  path = local(entry)
  if not entry or exists(path):
    return [path] if entry else []
  parts = [part if part == '**' else part.replace('**', '*') for part in path.relative_to(path.anchor).parts]
  while parts and parts[-1] == '**':  # everything below a directory, which its name means too
    parts.pop()
  at = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
  start, below = pathlib.Path(path.anchor, *parts[:at]), parts[max(at, 0) :]
  hidden = re.compile(r'\.[^.]')
  asked = any(map(hidden.match, below))
  found = start.glob('/'.join(below)) if below else []
  return sorted(p for p in found if asked or not any(map(hidden.match, p.relative_to(start).parts)))


def _documents(origin: pathlib.Path | str, text_field: str, messages_field: str) -> Iterator[Document]:
  if isinstance(origin, str):
    rows = _hub_rows(origin)
    if origin.partition(':')[0] == _BY_LINE:
      rows = _articles(rows)
  else:
    rows = _file_rows(origin, text_field, messages_field)
  for where, row in rows:
    with reading(
      '', where, 'set data.text_field or data.messages_field to the one with the data (docs/running.md)'
    ):
      content = records.content(row, text_field, messages_field)
    yield Document(where, content)


def _file_rows(path: pathlib.Path, text_field: str, messages_field: str) -> Rows:
  suffix = path.suffix.lower()
  with reading('', path, 'give UTF-8 text, a JSON object a line, a JSON list of objects, or Parquet'):
    if suffix in _WHOLE:
      yield str(path), {text_field: read_text(path, 'utf-8-sig')}
      return
    if suffix == '.parquet':
      yield from _parquet_rows(path, text_field, messages_field)
      return
    with open(regular(path), 'rb') as file:  # bytes, so that a line that is not UTF-8 still has a number
      # A .json file is one list of rows or, as in many data sets, has one row a line.
      if suffix == '.json' and file.read(256).removeprefix(b'\xef\xbb\xbf').lstrip().startswith(b'['):
        file.seek(0)
        for number, row in enumerate(json.loads(file.read().decode('utf-8-sig')), 1):
          yield f'{path}: row {number}', row
        return
      file.seek(0)
      for number, line in enumerate(file, 1):
        if line.strip():
          with reading('', f'{path}:{number}', 'give one JSON object a line, in UTF-8'):
            row = json.loads(line.decode('utf-8-sig'))
          yield f'{path}:{number}', row


def _parquet_rows(path: pathlib.Path, text_field: str, messages_field: str) -> Rows:
  from pyarrow import parquet

  with parquet.ParquetFile(regular(path)) as file:
    columns = records.columns(file.schema_arrow.names, text_field, messages_field)
    batches = file.iter_batches(batch_size=256, columns=columns)
    for number, row in enumerate(itertools.chain.from_iterable(b.to_pylist() for b in batches), 1):
      yield f'{path}: row {number}', row


def _articles(rows: Rows) -> Rows:
  """Joins the rows of WikiText, its lines, to articles, each of which begins with a heading ' = Title = '."""
  place, lines = '', list[str]()
  for where, row in rows:
    line = row.get('text') or ''
    if lines and _HEADING.fullmatch(line):
      yield place, {'text': ''.join(lines)}
      lines = []
    place = place if lines else where
    lines.append(line)
  if lines:
    yield place, {'text': ''.join(lines)}


def _hub_rows(entry: str) -> Rows:
  import datasets

  name, *rest = entry.split(':')
  split = rest.pop() if rest else 'train'
  try:
    # Streaming fetches only what is read: a run needs a small part of the large web corpora.
    found = datasets.load_dataset(name, *rest, split=split, streaming=True)
    for number, row in enumerate(found, 1):
      yield f'{entry}: row {number}', row
  except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
    # `datasets` leaves out the cause, so its offline mode is not seen in the error.
    kind = Unreachable if unreachable(error) and not datasets.config.HF_HUB_OFFLINE else InputError
    raise kind(
      f'{entry}: no such file, and not loadable as a hub data set ({first_line(error)}): '
      'check the name, config and split, or download its files and give their paths'
    ) from None
