"""The rows of training: cut from memory-mapped tokens, mixed and shuffled; nothing is held in memory.

Rows have segment ids, int32: equal ids belong to the same document, 0 is padding. Tokens attend only within
their segment, and the first token of a document is never a target.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt_jax.config.options import DataOptions, TrainOptions
from adapt_jax.data.documents import Source, is_blocks, open_blocks
from adapt_jax.data.order import Order
from adapt_jax.data.token_cache import FIRST, TARGET, Need, TokenCache, open_caches, token_directory
from adapt_jax.data.windows import check_targets, check_vocab, token_ids
from adapt_jax.models.errors import InputError

_FIELD = 'train.source'
# Tokens read at least, so that a short run draws from more than the first documents.
_LEAST_TOKENS = 2**22
_SAMPLE = 256  # rows in the digest of a train set


class PackedRows:
  """Concatenated documents, cut into windows of `length`; the tail is dropped. At most `most` rows.

  `fill` of this class and the next two writes a row into tokens int32 [T] and flags uint8 [T], both zero, and
  returns the number of tokens.
  """

  def __init__(self, parts: Sequence[TokenCache], length: int, most: int):
    self._parts, self._length = parts, length
    self._starts = np.cumsum([0] + [len(part.tokens) for part in parts])
    self.count = min(int(self._starts[-1]) // length, most)

  def fill(self, row: int, tokens: np.ndarray, flags: np.ndarray) -> int:
    done = 0
    while done < self._length:  # a row may continue in the next part
      start = row * self._length + done
      index = int(np.searchsorted(self._starts, start, 'right')) - 1
      part, offset = self._parts[index], start - self._starts[index]
      found = part.tokens[offset : offset + self._length - done]
      tokens[done : done + len(found)] = found
      flags[done : done + len(found)] = part.flags[offset : offset + self._length - done]
      done += len(found)
    return done


class PaddedRows:
  """One document per row, truncated to `length`. At most `most` rows."""

  def __init__(self, parts: Sequence[TokenCache], length: int, most: int):
    self._parts, self._length = parts, length
    self._starts = np.cumsum([0] + [len(part.ends) for part in parts])
    self.count = min(int(self._starts[-1]), most)

  def fill(self, row: int, tokens: np.ndarray, flags: np.ndarray) -> int:
    index = int(np.searchsorted(self._starts, row, 'right')) - 1
    part, number = self._parts[index], row - self._starts[index]
    start = int(part.ends[number - 1]) if number else 0
    count = min(int(part.ends[number]) - start, self._length)
    tokens[:count], flags[:count] = part.tokens[start : start + count], part.flags[start : start + count]
    return count


class BlockRows:
  """Rows of token ids [N, T], perhaps of a file; each is one document, with all tokens flagged as targets.

  Raises InputError, naming `where`, for invalid token ids; they are checked when rows are read, not all at
  the start, which would read the whole file.
  """

  def __init__(self, blocks: np.ndarray, vocab_size: int, where: str):
    self._blocks, self._where, self._vocab_size, self.count = blocks, where, vocab_size, len(blocks)
    self._ids(slice(0, _LEAST_TOKENS // blocks.shape[1]))

  def fill(self, row: int, tokens: np.ndarray, flags: np.ndarray) -> int:
    tokens[:], flags[:] = self._ids(row), TARGET
    flags[0] |= FIRST
    return len(tokens)

  def _ids(self, rows: int | slice) -> np.ndarray:
    found = token_ids(np.asarray(self._blocks[rows]), self._where)
    check_vocab(int(found.max(initial=0)), self._vocab_size, self._where)
    return found


Rows = PackedRows | PaddedRows | BlockRows


class TrainSet:
  """Rows of `length` tokens from groups that are mixed by weight; `len()` is the total number of rows.

  first: takes the place of every row's first token, which is never a target; None: nothing does.
  """

  def __init__(
    self,
    groups: Sequence[Rows],
    weights: Sequence[float],
    *,
    length: int,
    batch: int,
    seed: int,
    first: int | None = None,
  ):
    self._groups, self._length, self._first = groups, length, first
    counts = [group.count for group in groups]
    self._starts = np.cumsum([0, *counts])
    self._order = Order(counts, weights, batch=batch, seed=seed)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def digest(self) -> str:
    """SHA-256 of the number of rows and of a sample of them, spread evenly over all.

    Packed rows after an inserted or removed token are all different, so the sample notices most changes.
    """
    found = hashlib.sha256(str(len(self)).encode())
    for array in self.read(np.unique(np.linspace(0, len(self) - 1, _SAMPLE).astype(int))):
      found.update(array.tobytes())
    return found.hexdigest()

  def rows(self, step: int) -> np.ndarray:
    """The rows of batch number `step`: int64 [batch]; depends only on (seed, step), at equal cost for all."""
    return self._order.rows(step)

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens int32, targets bool and segments int32, [n, T], of these rows; reads no others.

    A target's prediction counts in the loss. Segments count from 1 in each row; padding has 0 everywhere.
    """
    shape = (len(rows), self._length)
    tokens, flags, counts = np.zeros(shape, np.int32), np.zeros(shape, np.uint8), np.zeros(len(rows), int)
    for index, row in enumerate(rows):
      group = int(np.searchsorted(self._starts, row, 'right')) - 1
      start = int(self._starts[group])
      counts[index] = self._groups[group].fill(int(row) - start, tokens[index], flags[index])
    segments = np.cumsum((flags & FIRST) > 0, axis=1, dtype=np.int32)
    segments += 1 - segments[:, :1]  # a window may begin within a document
    segments *= np.arange(self._length) < counts[:, None]
    targets = flags == TARGET  # and not FIRST
    targets[:, 0] = False
    if self._first is not None:
      tokens[:, 0] = self._first
    return tokens, targets, segments


def open_train_set(
  train: TrainOptions, data: DataOptions, tokenizer: Any, vocab_size: int, seed: int, first: int | None = None
) -> TrainSet:
  """The train set of the config; tokenises what is not on disk yet. Raises InputError.

  Without weights, the entries of train.source are concatenated. No entry is read much further than
  `train.tokens` requires. Rows begin with `first`, as in `TrainSet`, but for those of a .npy file.
  """
  length, blocks = train.length, is_blocks(train.source)
  used: list[tuple[Source, float]] = [(train.source, 1.0)]
  if train.weights and not blocks:
    shares = [weight / sum(train.weights) for weight in train.weights]
    used = [((entry,), share) for entry, share in zip(train.source, shares, strict=True) if share]
  groups = list[Rows]()
  for entries, share in used:
    if blocks:
      ids = open_blocks(entries, _FIELD, length)
      rows: Rows = BlockRows(ids, vocab_size, f'{_FIELD} {entries[0]!r}')
    else:
      rows = _open_rows(entries, share, train, data, tokenizer, vocab_size)
    if not rows.count:
      raise InputError(
        f'{_FIELD} = {", ".join(entries)} has not one row of {length} tokens: give more data or a shorter '
        f'train.length'
      )
    groups.append(rows)
  weights, first = [share for _, share in used], None if blocks else first
  return TrainSet(groups, weights, length=length, batch=train.batch, seed=seed, first=first)


def _open_rows(
  entries: Source, share: float, train: TrainOptions, data: DataOptions, tokenizer: Any, vocab_size: int
) -> Rows:
  """Enough rows for `share` of train.tokens, if the entries have that many."""
  length, padded = train.length, train.layout == 'padded'
  most = -(-max(int(train.tokens * share), _LEAST_TOKENS) // length)
  need = Need(0, most) if padded else Need(most * length)
  parts = open_caches(token_directory(data), entries, tokenizer, need, field=_FIELD, **data.fields)
  check_vocab(max(part.highest for part in parts), vocab_size, _FIELD)
  rows = PaddedRows(parts, length, most) if padded else PackedRows(parts, length, most)
  check_targets(not rows.count or any(part.targets for part in parts), _FIELD)
  return rows
