"""A view of a checkpoint with a trimmed vocabulary: fewer token ids, and fewer rows of embedding and head."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np

from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.hf_weights import TensorReader
from adapt_jax.models.formats.source import Source

_TABLES = ('model.embed_tokens.weight', 'lm_head.weight')  # a row for each id
# Fields of generation_config.json with ids of ordinary tokens, which may be gone.
_OF_ORDINARY_TOKENS = (
  'suppress_tokens', 'begin_suppress_tokens', 'bad_words_ids', 'sequence_bias', 'forced_decoder_ids',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class TrimmedSource(Source):
  """A checkpoint of which only some token ids are used; its other tensors are those of `original`.

  Its predictions are the original's on the condition that the next token is one of these: softmax over fewer
  logits. kept: the original's id of each new id, int64 [V]. tokenizer: with the new ids.
  """

  original: Source
  kept: np.ndarray
  tokenizer: Any

  def load_tokenizer(self) -> Any:
    return self.tokenizer

  def digest(self) -> str:
    """Equal if the same ids are kept."""
    return hashlib.sha256(self.kept.astype('<i8').tobytes()).hexdigest()[:32]


def trimmed_source(source: Source, ids: list[int], original: Any, tokenizer: Any) -> TrimmedSource:
  """The view of `source` with these ids of its `original` tokenizer; in `tokenizer`, ids[i] has the id i.

  Raises InputError for ids without a row, and for fields of generation_config.json that name tokens.
  """
  kept = np.array(ids_with_rows(source.config, ids, original), np.int64)
  return TrimmedSource(
    source.name,
    dataclasses.replace(source.config, vocab_size=len(kept)),
    _Rows(source.reader, kept),
    source.path,
    source.dtype,
    trimmed_generation(source.generation, ids),
    source.license,
    source,
    kept,
    tokenizer,
  )


def ids_with_rows(config: ModelConfig, ids: list[int], tokenizer: Any) -> list[int]:
  """Those of the ids of `needed_ids` that the embedding has rows for.

  The others are added tokens such as Gemma 3's image token, which come last: they keep lying beyond it.
  Raises InputError for other ids without a row. tokenizer: the original one.
  """
  kept = [i for i in ids if i < config.vocab_size]
  beyond = ids[len(kept) :]
  if ids[: len(kept)] != kept or not {*beyond} <= tokenizer.added_tokens_decoder.keys():
    raise InputError(f'the tokenizer has the id {max(ids)}, but the embedding only {config.vocab_size} rows')
  return kept


def trimmed_generation(fields: dict[str, Any], ids: list[int]) -> dict[str, Any]:
  """Fields of generation_config.json with the new ids; an id that is gone is never generated, and left out.

  Raises InputError for fields with ids of ordinary tokens.
  """
  new, found = {old: i for i, old in enumerate(ids)}, dict(fields)
  for name, value in fields.items():
    if name in _OF_ORDINARY_TOKENS and value:
      raise InputError(f'generation_config.json has {name}, which names tokens by their ids: remove it')
    if not name.endswith('_token_id'):
      continue
    if isinstance(value, list):
      found[name] = [new[i] for i in value if i in new]
    elif value is not None:
      found[name] = new.get(value)
  return found


class _Rows:
  """The tensors of a reader, with only the kept rows of the tables."""

  def __init__(self, reader: TensorReader, kept: np.ndarray):
    self._reader, self._kept = reader, kept
    self.where: str = reader.where
    self.files: list[pathlib.Path] = reader.files

  def names(self) -> set[str]:
    return self._reader.names()

  def shape(self, name: str) -> tuple[int, ...]:
    shape = self._reader.shape(name)
    return (len(self._kept), *shape[1:]) if name in _TABLES else shape

  def dtype(self, name: str) -> str:
    return self._reader.dtype(name)

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    if name not in _TABLES:
      return self._reader.read(name, index)
    rows, *columns = index or (slice(None),)
    return self._reader.read(name, (slice(None), *columns))[self._kept[rows]]
