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
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from adapt_jax.data import records
from adapt_jax.models.errors import InputError, Unreachable, first_line, unreachable
from adapt_jax.models.files import exists, local, read_text, regular
from adapt_jax.models.formats.npy import open_npy

Source = tuple[str, ...]

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
      _check_readable(origin)
    else:
      next(_documents(origin, text_field, messages_field), None)


def fingerprint(entry: str, field: str) -> list[Any]:
  """Identifies the data of one entry of a source: path, size and modification time of every file.

  For a hub data set: its revision, or '' if the hub does not give it. Raises InputError as reading does.
  """
  found: list[Any] = []
  for origin in _origins_of(entry, field):
    if isinstance(origin, str):
      found.append((origin, _hub_revision(origin.split(':')[0])))
      continue
    _check_readable(origin)
    status = origin.stat()
    found.append((str(origin.resolve()), status.st_size, status.st_mtime_ns))
  return found


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


def open_blocks(source: Source, field: str) -> np.ndarray:
  """Memory-maps the .npy file of `source`, integers [N, T]. Raises InputError for anything else."""
  try:
    blocks = open_npy(local(source[0]))
  except FileNotFoundError:
    raise InputError(f'{field} {source[0]!r}: no such file') from None
  except InputError as error:
    raise InputError(f'{field}: {error}') from None
  except OSError as error:
    raise InputError(f'{field} {source[0]!r}: cannot be read ({error.strerror})') from None
  if not isinstance(blocks, np.ndarray) or blocks.ndim != 2 or blocks.dtype.kind not in 'iu':
    found = f'{blocks.dtype} {list(blocks.shape)}' if isinstance(blocks, np.ndarray) else 'an archive'
    raise InputError(f'{field} {source[0]!r} holds {found}: token blocks are integers [rows, length]')
  return blocks


def _origins(source: Source, field: str) -> Iterator[pathlib.Path | str]:
  """The files (paths) and hub data sets (strings) that the entries refer to."""
  if not source:
    raise InputError(f'{field} is empty: name at least one file, directory, glob or hub data set')
  for entry in source:
    yield from _origins_of(entry, field)


def _origins_of(entry: str, field: str, matched: bool = False) -> Iterator[pathlib.Path | str]:
  """The files and hub data sets of one entry; matched: the entry is a match of a glob."""
  try:
    path = local(entry)
    found = exists(path)
  except InputError as error:
    raise InputError(f'{field}: {error}') from None
  if entry and path.is_dir():
    files = sorted(p for p in path.rglob('*') if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not files:
      raise InputError(f'{field} {entry!r}: no {", ".join(_SUFFIXES)} file in this directory')
    yield from files
  elif entry and found:
    if path.suffix.lower() == '.npy':
      raise InputError(f'{field} {entry!r}: a .npy file of token blocks must be the only entry')
    if path.suffix.lower() not in _SUFFIXES:
      raise InputError(f'{field} {entry!r}: unknown file type: use {", ".join(_SUFFIXES)}')
    yield path
  elif path.is_symlink():
    raise InputError(f'{field} {entry!r}: a link to a file that does not exist: repair or remove the link')
  elif not matched and (matches := _matches(entry)):
    for match in matches:
      yield from _origins_of(match, field, matched=True)
  elif hub_name(entry):
    yield entry
  else:
    named = ''
    if 'evaluate.source' in field and '=' in entry:
      named = '; a name before = begins with a letter and has only letters, digits, _ and -'
    raise InputError(
      f'{field} {entry!r}: no such file (a hub data set is written org/name:config:split{named}; '
      'make fetch downloads the demo)'
    )


def _matches(pattern: str) -> list[str]:
  """The paths that a glob matches, sorted; ** does not follow links, which may lead in circles."""
  parts = pathlib.PurePath(os.path.expanduser(pattern)).parts
  while parts and parts[-1] == '**':  # everything below a directory, which its name means too
    parts = parts[:-1]
  if not parts:
    return []
  at = parts.index('**') if '**' in parts else len(parts)
  starts = sorted(glob.glob(str(pathlib.PurePath(*parts[:at]))))
  if at == len(parts):
    return starts
  below = '/'.join(part if part == '**' else part.replace('**', '*') for part in parts[at:])
  hidden = any(part.startswith('.') for part in parts[at:])
  found = [(pathlib.Path(start), path) for start in starts for path in pathlib.Path(start).glob(below)]
  return sorted(
    str(p) for s, p in found if hidden or not any(x.startswith('.') for x in p.relative_to(s).parts)
  )


def _documents(origin: pathlib.Path | str, text_field: str, messages_field: str) -> Iterator[Document]:
  if isinstance(origin, str):
    found = _hub_rows(origin)
    if origin.partition(':')[0] == _BY_LINE:
      found = _articles(found)
  elif origin.suffix.lower() in _WHOLE:
    found = _whole_text(origin, text_field)
  elif origin.suffix.lower() == '.parquet':
    found = _parquet_rows(origin, text_field, messages_field)
  elif origin.suffix.lower() == '.json' and _is_list(origin):
    found = _json_list(origin)
  else:
    found = _json_rows(origin)
  for where, row in found:
    yield Document(where, records.content(row, where, text_field, messages_field))


def _check_readable(path: pathlib.Path) -> None:
  try:
    with open(regular(path), 'rb') as file:
      file.read(1)
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror})') from None


def _whole_text(path: pathlib.Path, text_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
  try:
    text = read_text(path, 'utf-8-sig')
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: not UTF-8 text (byte {error.start}): convert the file') from None
  except OSError as error:
    raise InputError(f'{path}: cannot be read ({error.strerror})') from None
  yield str(path), {text_field: text}


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  _check_readable(path)
  with open(path, 'rb') as file:  # bytes, so that a line that is not UTF-8 still has a number
    for number, line in enumerate(file, 1):
      where = f'{path}:{number}'
      if not line.strip():
        continue
      try:
        row = json.loads(line.decode('utf-8-sig'))
      except UnicodeDecodeError:
        raise InputError(f'{where}: not UTF-8 text: convert the file') from None
      except (ValueError, RecursionError) as error:
        raise InputError(f'{where}: not valid JSON ({error}): one object a line') from None
      if not isinstance(row, dict):
        raise InputError(f'{where}: a JSON {type(row).__name__}, not an object')
      yield where, row


def _is_list(path: pathlib.Path) -> bool:
  """Whether a .json file is one list of rows; if not, it has one row per line, as in many data sets."""
  _check_readable(path)
  with open(path, 'rb') as file:
    return file.read(256).removeprefix(b'\xef\xbb\xbf').lstrip().startswith(b'[')


def _json_list(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  try:
    found = json.loads(read_text(path, 'utf-8-sig'))
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: not UTF-8 text (byte {error.start}): convert the file') from None
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path}: not valid JSON ({error}): one list of rows') from None
  for number, row in enumerate(found, 1):
    if not isinstance(row, dict):
      raise InputError(f'{path}: row {number}: a JSON {type(row).__name__}, not an object')
    yield f'{path}: row {number}', row


def _parquet_rows(
  path: pathlib.Path, text_field: str, messages_field: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  import pyarrow
  from pyarrow import parquet

  try:
    with parquet.ParquetFile(regular(path)) as file:
      columns = records.columns(file.schema_arrow.names, text_field, messages_field)
      batches = file.iter_batches(batch_size=256, columns=columns)
      for number, row in enumerate(itertools.chain.from_iterable(b.to_pylist() for b in batches), 1):
        yield f'{path}: row {number}', row
  except InputError:
    raise
  # Columns of times may have zones that do not exist, and times that no calendar has.
  except (pyarrow.ArrowException, ArithmeticError, LookupError, OSError, ValueError) as error:
    raise InputError(f'{path}: not a readable Parquet file ({first_line(error)})') from None


def _articles(rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _hub_rows(entry: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
