"""Cuts text into windows of tokens in memory, for calibration and evaluation; `train_set` is for training."""

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt_jax.data.chats import render_all
from adapt_jax.data.documents import Source, is_blocks, open_blocks, read_documents
from adapt_jax.data.tokenise import BATCH_CHARS, encode, take
from adapt_jax.machine.progress import Progress
from adapt_jax.models.errors import InputError
from adapt_jax.models.families import Family

# At least this many tokens of a source are read, so that draws cover more than its first documents. It is
# also a limit, for streams of hub data sets.
POOL_TOKENS = 2**22


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Windows of tokens: `tokens` int32 [N, T], `targets` bool [N, T].

  `targets` is True where the prediction of this token itself counts in the loss; the first column is
  False, since nothing in its window predicts it. `documents` is how many were read (0 for a .npy file).
  """

  tokens: np.ndarray
  targets: np.ndarray
  documents: int

  def digest(self) -> str:
    """SHA-256 of all windows."""
    return hashlib.sha256(self.tokens.tobytes() + self.targets.tobytes()).hexdigest()

  def draw(self, count: int, seed: int, step: int) -> np.ndarray:
    """Draws `count` distinct rows, anew for each step: int64 [count]. Raises InputError for too few rows."""
    return draw_rows(len(self.tokens), count, seed, step)


@dataclasses.dataclass(frozen=True)
class MixedBlocks(Blocks):
  """Windows of several sources, one after another; each source has a fixed share of every draw.

  names: names of the sources. counts: rows of each. shares: weights of the sources in a draw, none negative.
  """

  names: tuple[str, ...]
  counts: tuple[int, ...]
  shares: tuple[float, ...]

  def draw(self, count: int, seed: int, step: int) -> np.ndarray:
    """Draws `count` distinct rows, each source's quota from its own rows; the first source's rows first."""
    found, start = [], 0
    shared = zip(self.names, self.counts, quotas(self.shares, count), strict=True)
    for part, (name, rows, quota) in enumerate(shared):
      if quota > rows:
        raise InputError(
          f'prune.calibration.samples = {count} takes {quota} rows from {name!r}, which has {rows} of '
          f'{self.tokens.shape[1]} tokens: lower it or the weight, or give more text'
        )
      found.append(start + draw_rows(rows, quota, seed, step, part=part))
      start += rows
    return np.concatenate(found)


def quotas(shares: Sequence[float], count: int) -> list[int]:
  """Divides `count` by weight into whole numbers; the largest remainders are rounded up."""
  exact = np.array(shares, float) * count / sum(shares)
  whole = np.floor(exact).astype(int)
  whole[np.argsort(whole - exact, kind='stable')[: count - whole.sum()]] += 1
  return whole.tolist()


def mixed(names: Sequence[str], parts: Sequence[Blocks], shares: Sequence[float]) -> MixedBlocks:
  """Combines sources, with their names, to draw from them by weight."""
  tokens, targets = (np.concatenate([getattr(b, name) for b in parts]) for name in ('tokens', 'targets'))
  counts = tuple(len(b.tokens) for b in parts)
  return MixedBlocks(tokens, targets, sum(b.documents for b in parts), tuple(names), counts, tuple(shares))


@dataclasses.dataclass(frozen=True)
class TokenStream:
  """A source's documents one after another: `tokens` int32 [n], `targets` bool [n], `ends` int64 [d].

  first: takes the place of every window's first token, which is never a target; None: nothing does.
  """

  tokens: np.ndarray
  targets: np.ndarray
  ends: np.ndarray
  first: int | None = None

  def blocks(self, length: int, field: str) -> Blocks:
    """Non-overlapping windows of `length` tokens, without the tail. Raises InputError if there are none."""
    return self._begun(_cut(self.tokens, self.targets, length, sys.maxsize, len(self.ends), field))

  def spans(self, length: int, seed: int, field: str) -> Blocks:
    """One window from each document of at least `length` tokens, at a random place. Raises InputError."""
    starts = np.concatenate([[0], self.ends])[:-1]
    room = self.ends - starts - length
    starts, room = starts[room >= 0], room[room >= 0]
    if not len(starts):
      raise InputError(
        f'{field}: none of its {len(self.ends)} documents has {length} tokens: give longer documents, or a '
        'shorter sequence length'
      )
    # The counter's last word keeps these draws apart from those of `draw_rows`.
    key, counter = np.array([seed, 0], np.uint64), np.array([0, 0, 0, 2], np.uint64)
    places = np.random.Generator(np.random.Philox(key=key, counter=counter)).integers(0, room, endpoint=True)
    index = (starts + places)[:, None] + np.arange(length)
    targets = self.targets[index]
    targets[:, 0] = False
    return self._begun(Blocks(self.tokens[index], targets, len(self.ends)))

  def _begun(self, blocks: Blocks) -> Blocks:
    if self.first is None:
      return blocks
    tokens = blocks.tokens.copy()
    tokens[:, 0] = self.first
    return dataclasses.replace(blocks, tokens=tokens)


def first_of_rows(family: Family, tokenizer: Any) -> int | None:
  """The token that every row must begin with: the tokenizer's BOS if the family needs it; else None."""
  return tokenizer.bos_token_id if family.needs_bos else None


def load_blocks(
  source: Source,
  tokenizer: Any,
  length: int,
  *,
  text_field: str,
  messages_field: str,
  field: str,
  max_tokens: int | None = None,
  first: int | None = None,
) -> Blocks:
  """Reads and tokenises `source` and cuts it into non-overlapping windows of `length` tokens.

  Documents are concatenated, each with the tokenizer's special tokens (BOS) before it and an EOS after it,
  if the tokenizer has them; a conversation has those of its chat template, and only the assistant's tokens
  are targets. A tail shorter than a window is dropped. At most `max_tokens` tokens are kept, and no document
  beyond them is tokenised. Windows begin with `first`, as in `TokenStream`. A .npy source is used unchanged,
  without `tokenizer`.

  Raises InputError, naming `field` or the file, for a source that cannot be read or is shorter than one
  window, and for conversations that the tokenizer's chat template cannot render.
  """
  if is_blocks(source):
    return _load_npy(source, length, sys.maxsize if max_tokens is None else max_tokens, field)
  fields = {'text_field': text_field, 'messages_field': messages_field}
  stream = load_stream(source, tokenizer, **fields, field=field, max_tokens=max_tokens, first=first)
  return stream.blocks(length, field)


def load_stream(
  source: Source,
  tokenizer: Any,
  *,
  text_field: str,
  messages_field: str,
  field: str,
  max_tokens: int | None = None,
  first: int | None = None,
) -> TokenStream:
  """The tokens that `load_blocks` cuts into windows; several lengths need no second tokenisation."""
  limit = sys.maxsize if max_tokens is None else max_tokens
  documents = read_documents(source, field, text_field=text_field, messages_field=messages_field)
  texts = render_all(documents, tokenizer)
  found, size = [encode((), tokenizer)], 0
  with Progress(f'reading {field}', None, 'tokens') as bar:
    # A token is rarely shorter than a character, so reading n characters for n missing tokens is never
    # too much; a few rounds suffice, without reading far beyond the limit.
    while batch := take(texts, BATCH_CHARS, limit - size):
      found.append(encode(batch, tokenizer))
      size += len(found[-1].tokens)
      bar.update(len(found[-1].tokens))
  tokens = np.concatenate([x.tokens for x in found]).view(np.int32)[:limit]
  targets = np.concatenate([x.targets for x in found])[:limit]
  ends = np.cumsum(np.concatenate([x.lengths for x in found])).clip(max=limit)
  return TokenStream(tokens, targets, ends, first)


def read_for(max_tokens: int) -> int:
  """How many tokens of a text are read, from its start, to `spread` windows of `max_tokens` tokens over."""
  return max(max_tokens, POOL_TOKENS) if max_tokens else sys.maxsize


def spread(blocks: Blocks, max_tokens: int) -> Blocks:
  """Windows of at most `max_tokens` tokens in all, evenly spaced over `blocks`; at least one. 0: all.

  If not all are taken, those without a token to predict, such as windows within a long prompt, are left out.
  """
  count, length = blocks.tokens.shape
  wanted = max(1, max_tokens // length) if max_tokens else count
  if wanted >= count:
    return blocks
  rows = np.flatnonzero(blocks.targets.any(axis=1))
  if wanted < len(rows):
    rows = rows[np.linspace(0, len(rows) - 1, wanted).round().astype(int)]
  return dataclasses.replace(blocks, tokens=blocks.tokens[rows], targets=blocks.targets[rows])


def check_targets(blocks: Blocks, field: str) -> None:
  """Raises InputError if no token of the windows is a target."""
  if not blocks.targets.any():
    rows, length = blocks.tokens.shape
    raise InputError(
      f"{field}: no token to predict in {rows} rows of {length} tokens: chats need the assistant's messages"
    )


def check_vocab(highest: int, vocab_size: int, field: str) -> None:
  """Raises InputError if the token id `highest` has no row in an embedding of `vocab_size` rows."""
  if highest >= vocab_size:
    raise InputError(
      f'{field}: token id {highest}, but the embedding has only {vocab_size} rows: '
      'use the tokenizer that belongs to the model'
    )


def draw_rows(num_rows: int, count: int, seed: int, step: int, part: int = 0) -> np.ndarray:
  """Draws `count` distinct rows out of `num_rows`, anew for each step: int64 [count].

  If all rows are drawn, they keep their order. Each `part` has its own draws. Raises InputError for too few
  rows.
  """
  if count > num_rows:
    raise InputError(
      f'prune.calibration.samples = {count}, but the text is only long enough for {num_rows} rows: '
      f'lower it, shorten the rows, or give more text'
    )
  if count == num_rows:
    return np.arange(num_rows)
  # The counter's last word keeps these draws apart from others of the same key.
  key, counter = np.array([seed, step], np.uint64), np.array([0, 0, part, 1], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter)).choice(
    num_rows, count, replace=False
  )


def _load_npy(source: Source, length: int, limit: int, field: str) -> Blocks:
  blocks = map_blocks(source, length, field)
  tokens = token_ids(np.array(blocks[: limit // length]), f'{field} {source[0]!r}').ravel()
  return _cut(tokens, np.ones(tokens.shape, np.bool_), length, limit, 0, field)


def map_blocks(source: Source, length: int, field: str) -> np.ndarray:
  """The rows of a .npy source, memory-mapped but not read: integers [N, length]. Raises InputError."""
  blocks = open_blocks(source, field)
  if blocks.shape[1] != length:
    raise InputError(
      f'{field} {source[0]!r} has rows of {blocks.shape[1]} tokens, the sequence length is {length}: '
      f'set it to {blocks.shape[1]}'
    )
  return blocks


def token_ids(values: np.ndarray, where: str) -> np.ndarray:
  """Converts integers to int32. Raises InputError, naming `where`, if they cannot be token ids."""
  if values.size and (values.min() < 0 or values.max() > np.iinfo(np.int32).max):
    raise InputError(f'{where} holds {values.min()} to {values.max()}: not token ids')
  return values.astype(np.int32)


def _cut(
  tokens: np.ndarray, targets: np.ndarray, length: int, limit: int, documents: int, field: str
) -> Blocks:
  """Cuts `tokens` and `targets` [tokens] into `Blocks`."""
  count = min(tokens.size, limit)
  rows = count // length
  if not rows:
    raise InputError(
      f'{field}: the data has only {count} tokens, fewer than one window of {length}: '
      'give more data or a shorter sequence length'
    )
  targets = targets[: rows * length].reshape(rows, length).copy()
  targets[:, 0] = False
  return Blocks(tokens[: rows * length].reshape(rows, length), targets, documents)
