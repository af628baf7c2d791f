"""Windows of tokens in memory, for calibration and evaluation; `train_set` has the rows of training."""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt_jax.data.documents import Source, open_blocks
from adapt_jax.data.token_cache import TARGET, Need, open_caches
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

  def has_chats(self, bos: int | None) -> bool:
    """Whether some windows are of chats: of plain text only `bos` and the first token do not count."""
    return bool((~self.targets[:, 1:] & (self.tokens[:, 1:] != bos)).any())

  def draw(self, count: int, seed: int, step: int) -> np.ndarray:
    """Draws `count` distinct rows, anew for each step: int64 [count]. Raises InputError for too few rows."""
    return draw_rows(len(self.tokens), count, seed, step)


@dataclasses.dataclass(frozen=True)
class MixedBlocks(Blocks):
  """Windows of several sources, one after another; each source has a fixed share of every draw.

  sources: name, number of rows and weight of each, none negative.
  """

  sources: tuple[tuple[str, int, float], ...]

  def draw(self, count: int, seed: int, step: int) -> np.ndarray:
    """Draws `count` distinct rows, each source's quota from its own rows; the first source's rows first."""
    rows, start = [], 0
    shares = quotas([share for _, _, share in self.sources], count)
    for part, ((name, size, _), quota) in enumerate(zip(self.sources, shares, strict=True)):
      rows.append(start + draw_rows(size, quota, seed, step, part=part, name=f' of {name!r}'))
      start += size
    return np.concatenate(rows)


def quotas(shares: Sequence[float], count: int) -> list[int]:
  """Divides `count` by weight into whole numbers; the largest remainders are rounded up."""
  exact = np.array(shares, float) * count / sum(shares)
  whole = np.floor(exact).astype(int)
  whole[np.argsort(whole - exact, kind='stable')[: count - whole.sum()]] += 1
  return whole.tolist()


def mixed(names: Sequence[str], parts: Sequence[Blocks], shares: Sequence[float]) -> MixedBlocks:
  """Combines sources, with their names, to draw from them by weight."""
  tokens, targets = (np.concatenate([getattr(b, name) for b in parts]) for name in ('tokens', 'targets'))
  sources = tuple(zip(names, [len(b.tokens) for b in parts], shares, strict=True))
  return MixedBlocks(tokens, targets, sum(b.documents for b in parts), sources)


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
    rows = len(self.tokens) // length
    tokens, targets = (x[: rows * length].reshape(rows, length) for x in (self.tokens, self.targets.copy()))
    return self._begun(tokens, targets, field)

  def spans(self, length: int, seed: int, field: str) -> Blocks:
    """One window from each document of at least `length` tokens, at a random place. Raises InputError."""
    starts = np.concatenate([[0], self.ends])[:-1]
    room = self.ends - starts - length
    starts, room = starts[room >= 0], room[room >= 0]
    # The counter's last word keeps these draws apart from those of `draw_rows`.
    key, counter = np.array([seed, 0], np.uint64), np.array([0, 0, 0, 2], np.uint64)
    places = np.random.Generator(np.random.Philox(key=key, counter=counter)).integers(0, room, endpoint=True)
    index = (starts + places)[:, None] + np.arange(length)
    return self._begun(self.tokens[index], self.targets[index], field)

  def _begun(self, tokens: np.ndarray, targets: np.ndarray, field: str) -> Blocks:
    targets[:, 0] = False
    if self.first is not None:
      tokens = tokens.copy()
      tokens[:, 0] = self.first
    return _some(Blocks(tokens, targets, len(self.ends)), f'{field} ({len(self.tokens)} tokens)')


def first_of_rows(family: Family, tokenizer: Any) -> int | None:
  """The token that every row must begin with: the tokenizer's BOS if the family needs it; else None."""
  return tokenizer.bos_token_id if family.needs_bos else None


def load_blocks(source: Source, length: int, limit: int, field: str) -> Blocks:
  """The rows of a .npy source, of at most `limit` tokens. Raises InputError, naming `field`."""
  tokens = token_ids(
    np.array(open_blocks(source, field, length)[: limit // length]), f'{field} {source[0]!r}'
  )
  targets = np.ones(tokens.shape, np.bool_)
  targets[:, 0] = False
  return _some(Blocks(tokens, targets, 0), field)


def load_stream(
  directory: pathlib.Path | None, source: Source, tokenizer: Any, limit: int, first: int | None, **fields: str
) -> TokenStream:
  """The first `limit` tokens of a source.

  Documents are concatenated, each with the tokenizer's special tokens (BOS) before it and an EOS after it,
  if the tokenizer has them; a conversation has its chat template's, and only the assistant's tokens
  are targets. fields: as for `open_cache`, which raises InputError.
  """
  caches = open_caches(directory, source, tokenizer, Need(limit), **fields)
  starts = np.cumsum([0, *(len(cache.tokens) for cache in caches)])
  tokens, flags = (np.concatenate([getattr(c, n)[:limit] for c in caches]) for n in ('tokens', 'flags'))
  ends = np.concatenate([cache.ends for cache in caches])
  ends += np.repeat(starts[:-1], [len(cache.ends) for cache in caches])
  ends = ends[: np.searchsorted(ends, limit) + 1].clip(max=limit)  # of the documents that begin before it
  return TokenStream(tokens[:limit].astype(np.int32), (flags[:limit] & TARGET) > 0, ends, first)


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


def check_targets(predicted: bool, field: str) -> None:
  """Raises InputError unless some token is a target."""
  if not predicted:
    raise InputError(f"{field}: no token to predict: chats need the assistant's messages")


def check_vocab(highest: int, vocab_size: int, field: str) -> None:
  """Raises InputError if the token id `highest` has no row in an embedding of `vocab_size` rows."""
  if highest >= vocab_size:
    raise InputError(
      f'{field}: token id {highest}, but the embedding has only {vocab_size} rows: '
      'use the tokenizer that belongs to the model'
    )


def draw_rows(num_rows: int, count: int, seed: int, step: int, part: int = 0, name: str = '') -> np.ndarray:
  """Draws `count` distinct rows out of `num_rows`, anew for each step: int64 [count].

  If all rows are drawn, they keep their order. Each `part` has its own draws. Raises InputError for too few
  rows; `name`: of which source, for its message.
  """
  if count > num_rows:
    raise InputError(
      f'prune.calibration.samples takes {count} rows{name}, but the text is only long enough for {num_rows}: '
      f'lower it, shorten the rows, or give more text'
    )
  if count == num_rows:
    return np.arange(num_rows)
  # The counter's last word keeps these draws apart from others of the same key.
  key, counter = np.array([seed, step], np.uint64), np.array([0, 0, part, 1], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter)).choice(
    num_rows, count, replace=False
  )


def token_ids(values: np.ndarray, where: str) -> np.ndarray:
  """Converts integers to int32. Raises InputError, naming `where`, if they cannot be token ids."""
  if values.size and (values.min() < 0 or values.max() > np.iinfo(np.int32).max):
    raise InputError(f'{where} holds {values.min()} to {values.max()}: not token ids')
  return values.astype(np.int32)


def _some(blocks: Blocks, what: str) -> Blocks:
  """The blocks, of which there must be some. Raises InputError."""
  if not len(blocks.tokens):
    raise InputError(
      f'{what}: not one row of {blocks.tokens.shape[1]} tokens: give more data, longer documents, or a '
      f'shorter sequence length'
    )
  return blocks
