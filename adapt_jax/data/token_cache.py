"""A source's tokens on disk: tokenised once, then memory-mapped.

A cache is a directory with the source's documents one after another, in native byte order:

    tokens      uint16 or uint32 [n], whichever holds the tokenizer's ids
    flags       uint8 [n]: TARGET, FIRST
    ends        int64 [d]: where each document ends
    meta.json   counts, whether this is all of the source, and a checksum of each file and of itself

Its name begins with a hash of everything that its contents depend on, so a cache is never out of date. It is
renamed into place when it is complete; if several processes make it at once, the first wins and the others
use its result.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import jax
import numpy as np

from adapt_jax.config.options import DataOptions
from adapt_jax.data.chats import day
from adapt_jax.data.documents import Document, Source, fingerprint, read_documents
from adapt_jax.data.tokenise import BATCH_CHARS, Encoded, encode_all, take
from adapt_jax.machine.processes import WAITS, decide, say
from adapt_jax.machine.progress import Progress, phase
from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.files import json_checksum, local, read_text, user_cache

_Opened = TypeVar('_Opened')
TARGET, FIRST = 1, 2  # the token counts in the loss; it is the first of its document

_VERSION = 5  # of the format and of the tokenisation
_FILES = ('tokens', 'flags', 'ends')
_PART = 2**24  # bytes or tokens that are read at once
_MOST_REFUSED = 0.01  # share of a source's conversations that may be left out
_FEW_REFUSED = 10  # so many at the start of a source do not tell its share
_STALE_SECONDS = 86_400.0  # without a write, after which the files of a killed process are removed


def token_directory(data: DataOptions) -> pathlib.Path:
  """The directory of all token caches: data.cache, or one in the user's cache directory."""
  return local(data.cache) if data.cache else user_cache('tokens')


@dataclasses.dataclass(frozen=True)
class Need:
  """How much of a source is needed: numbers of tokens and of documents."""

  tokens: int
  documents: int = 0


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """An opened cache, memory-mapped but not read; see the module docstring for its arrays.

  highest: the highest token id. targets: number of tokens with TARGET that are not FIRST. complete: the
  source has no more tokens. refused: how many conversations the chat template refused, which are left out.
  """

  tokens: np.ndarray
  flags: np.ndarray
  ends: np.ndarray
  highest: int
  targets: int
  complete: bool
  refused: int = 0

  def holds(self, need: Need) -> bool:
    return self.complete or (len(self.tokens) >= need.tokens and len(self.ends) >= need.documents)


def open_cache(
  directory: pathlib.Path,
  entry: str,
  tokenizer: Any,
  need: Need,
  *,
  text_field: str,
  messages_field: str,
  field: str,
) -> TokenCache:
  """The tokens of one entry of a source, at least `need` or all of them; tokenises them if not cached yet.

  Do not use tokens beyond `need`: their number depends on the run that made the cache. The first process
  tokenises; all processes must call this and see `directory`. Raises InputError as reading and tokenising
  do, if the chat template refuses more than a hundredth of the source, and if the cache cannot be written
  or read.
  """
  fields = {'text_field': text_field, 'messages_field': messages_field}

  def prepare() -> str:
    key = _key(fingerprint(entry, field), tokenizer, fields)
    documents = read_documents((entry,), field, **fields)
    try:
      path = _find(directory, key, need)
      return str(path or _build(directory, key, documents, tokenizer, need, f'{field} {entry}'))
    except OSError as error:
      raise InputError(
        f'data.cache: {directory} cannot be used ({error.strerror or first_line(error)}): name a directory '
        'or set XDG_CACHE_HOME to one, with room for three to five bytes a token'
      ) from None

  path = pathlib.Path(decide(prepare))
  cache = seen_by_all(path, lambda: _open(path))
  if cache.refused:
    say(f'{field} {entry}: the chat template rejects {cache.refused} conversations, which are left out')
  return cache


def seen_by_all(path: pathlib.Path, opened: Callable[[], _Opened | None]) -> _Opened:
  """What the first process has written to data.cache, as soon as this process sees it. Raises InputError."""
  for seconds in WAITS:
    time.sleep(seconds)
    if (found := opened()) is not None:
      return found
  raise InputError(
    f'data.cache: {path} cannot be read by process {jax.process_index()}: name a directory that all '
    f'processes see'
  )


def open_caches(
  directory: pathlib.Path | None, source: Source, tokenizer: Any, need: Need, **fields: str
) -> list[TokenCache]:
  """Opens entries of a source in order, as by `open_cache`, until they hold what is needed.

  directory: None: in the user's cache directory.
  """
  caches: list[TokenCache] = []
  for entry in source or ('',):
    tokens = need.tokens - sum(len(cache.tokens) for cache in caches)
    documents = need.documents - sum(len(cache.ends) for cache in caches)
    if caches and tokens <= 0 and documents <= 0:
      break
    place, rest = directory or user_cache('tokens'), Need(tokens, documents)
    caches.append(open_cache(place, entry, tokenizer, rest, **fields))
  return caches


def used_ids(directory: pathlib.Path | None, source: Source, tokenizer: Any, **fields: str) -> list[int]:
  """All ids that occur when every document of a source is tokenised, in ascending order.

  Takes the arguments of `open_caches`. Raises InputError as it does, and for a text without tokens.
  """
  caches = open_caches(directory, source, tokenizer, Need(sys.maxsize), **fields)
  used = np.zeros(1 + max(cache.highest for cache in caches), bool)
  for cache in caches:
    for start in range(0, len(cache.tokens), _PART):
      used[cache.tokens[start : start + _PART]] = True
  if not used.any():
    raise InputError(
      f'{fields["field"]}: the text is empty: give text of the kind that the model will read and write'
    )
  ids: list[int] = np.flatnonzero(used).tolist()
  return ids


def _key(data: list[Any], tokenizer: Any, fields: dict[str, str]) -> str:
  tokenizer('')  # removes the truncation that a tokenizer.json may set, as tokenising does
  if tokenizer.is_fast:
    model = tokenizer.backend_tokenizer.to_str()
  else:
    model = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
  template = [tokenizer.chat_template, *day(tokenizer)]
  parts = [_VERSION, data, fields, model, tokenizer.special_tokens_map, *template]
  return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def _find(directory: pathlib.Path, key: str, need: Need) -> pathlib.Path | None:
  """The smallest cache of the key that holds enough; removes damaged ones, so that they are made again.

  Reads all of that cache, to compare its checksums.
  """
  paths = [path for path in directory.glob(f'{key}-*') if path.name.split('-')[1].isdecimal()]
  for path in sorted(paths, key=lambda path: int(path.name.split('-')[1])):
    cache = _open(path)
    if cache and not cache.holds(need):
      continue
    if cache and _open(path, whole=True):
      return path
    say(f'{path} is damaged: it is removed, and the text is tokenised again')
    shutil.rmtree(path, ignore_errors=True)
  return None


def _open(path: pathlib.Path, whole: bool = False) -> TokenCache | None:
  """The cache, or None if it is damaged or absent. whole: all of it is read, to compare its checksums."""

  def load(name: str, dtype: Any, count: int) -> np.ndarray:
    if not count:
      return np.zeros(0, dtype)
    return np.memmap(path / name, dtype, 'r', shape=(count,)).view(np.ndarray)

  try:
    meta = json.loads(read_text(path / 'meta.json'))
    if meta.pop('checksum') != json_checksum(meta):
      return None
    if whole and any(
      _checksum(path / n, (path / n).stat().st_mtime_ns) != meta['checksums'][n] for n in _FILES
    ):
      return None
    tokens = load('tokens', meta['dtype'], meta['tokens'])
    flags, ends = load('flags', np.uint8, meta['tokens']), load('ends', np.int64, meta['documents'])
    return TokenCache(tokens, flags, ends, *(meta[n] for n in ('highest', 'targets', 'complete', 'refused')))
  except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
    return None  # other OS errors do not show that the cache is damaged


@functools.lru_cache
def _checksum(path: pathlib.Path, time_ns: int) -> int:
  """The checksum of a file that was written at this time; a process reads each file once."""
  value = 0
  with phase('checking tokens'), open(path, 'rb') as file:
    while part := file.read(_PART):
      value = zlib.crc32(part, value)
  return value


def _build(
  directory: pathlib.Path, key: str, documents: Iterator[Document], tokenizer: Any, need: Need, title: str
) -> pathlib.Path:
  directory.mkdir(parents=True, exist_ok=True)
  for left in directory.glob(f'.{key}-*'):
    if time.time() - _last_written(left) > _STALE_SECONDS:
      shutil.rmtree(left, ignore_errors=True)
  beside = directory / f'.{key}-{secrets.token_hex(8)}'
  beside.mkdir()
  try:
    with contextlib.ExitStack() as stack:
      files: dict[str, BinaryIO] = {n: stack.enter_context(open(beside / n, 'wb')) for n in _FILES}
      writer = _Writer(beside, files, max(tokenizer.get_vocab().values(), default=0))
      bar = stack.enter_context(Progress(f'tokenising {title}', None, 'tokens'))
      for encoded in encode_all(_batches(documents, writer, need), tokenizer):
        writer.append(encoded)
        bar.update(len(encoded.tokens))
      writer.finish()
    path = directory / f'{key}-{writer.tokens}'
    if (other := _open(path)) and not other.holds(need):  # the same tokens, but not marked as complete
      shutil.rmtree(path)
    try:
      beside.rename(path)
    except OSError:
      if not path.is_dir():
        raise  # else another process was faster
    return path
  finally:
    shutil.rmtree(beside, ignore_errors=True)


def _batches(documents: Iterator[Document], writer: '_Writer', need: Need) -> Iterator[list[Document]]:
  """Batches of documents until what is written meets the need, or there are no more."""
  while not (writer.tokens >= need.tokens and writer.documents >= need.documents):
    if not (batch := take(documents, BATCH_CHARS)):
      writer.complete = True
      return
    yield batch


def _last_written(path: pathlib.Path) -> float:
  """When a file of the directory was last written; the current time if it disappears meanwhile."""
  try:
    return max(p.stat().st_mtime for p in (path, *path.iterdir()))
  except FileNotFoundError:
    return time.time()


class _Writer:
  """Appends to the files of a cache.

  complete: there are no more documents.
  """

  def __init__(self, path: pathlib.Path, files: dict[str, BinaryIO], highest_id: int):
    self._path, self._files = path, files
    self._dtype = np.dtype(np.uint16 if highest_id < 2**16 else np.uint32)
    self.tokens = self.documents = self._targets = self._highest = 0
    self.complete, self._refused = False, list[str]()
    self._checksums = dict.fromkeys(_FILES, 0)

  def append(self, encoded: Encoded) -> None:
    """Writes documents. Raises InputError if the chat template has refused too many of all."""
    ends = np.cumsum(encoded.lengths)
    flags = encoded.targets.astype(np.uint8) * np.uint8(TARGET)
    flags[(ends - encoded.lengths)[encoded.lengths > 0]] |= FIRST
    self._write('tokens', encoded.tokens.astype(self._dtype).tobytes())
    self._write('flags', flags.tobytes())
    self._write('ends', (self.tokens + ends).astype(np.int64).tobytes())
    self._highest = max(self._highest, int(encoded.tokens.max(initial=0)))
    self._targets += int((flags == TARGET).sum())
    self.tokens, self.documents = self.tokens + len(flags), self.documents + len(ends)
    self._refused += encoded.refused
    self._check_refused(_FEW_REFUSED)

  def _write(self, name: str, data: bytes) -> None:
    self._files[name].write(data)
    self._checksums[name] = zlib.crc32(data, self._checksums[name])

  def _check_refused(self, few: int) -> None:
    """Raises InputError if the template refuses many conversations, a sign that it is the wrong one."""
    every = self.documents + len(self._refused)
    if len(self._refused) > max(few, _MOST_REFUSED * every):
      raise InputError(f'{self._refused[0]}; {len(self._refused)} of the first {every} are rejected')

  def finish(self) -> None:
    self._check_refused(0)
    for file in self._files.values():
      file.flush()
      os.fsync(file.fileno())
    meta = {'dtype': self._dtype.name, 'highest': self._highest, 'complete': self.complete}
    meta |= {'tokens': self.tokens, 'documents': self.documents, 'targets': self._targets}
    meta |= {'refused': len(self._refused), 'checksums': self._checksums}
    (self._path / 'meta.json').write_text(json.dumps(meta | {'checksum': json_checksum(meta)}))
