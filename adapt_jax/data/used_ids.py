"""The token ids that a text uses, from which a vocabulary is trimmed."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from adapt_jax.data.documents import Document, Source, read_documents
from adapt_jax.data.token_cache import check_refused
from adapt_jax.data.tokenise import BATCH_CHARS, encode_all, take
from adapt_jax.machine.progress import Progress
from adapt_jax.models.errors import InputError


def used_ids(
  source: Source, tokenizer: Any, field: str, *, text_field: str, messages_field: str
) -> list[int]:
  """All ids that occur when every document of a source is tokenised, in ascending order.

  Raises InputError, naming `field` or the file, as reading does, and if the chat template refuses more than a
  hundredth of the conversations.
  """
  documents = read_documents(source, field, text_field=text_field, messages_field=messages_field)
  found, refused, count = set[int](), tuple[str, ...](), 0
  with Progress(f'reading {field}', None, 'tokens') as bar:
    for encoded in encode_all(_batches(documents), tokenizer):
      found.update(np.unique(encoded.tokens).tolist())
      refused, count = refused + encoded.refused, count + len(encoded.lengths)
      check_refused(refused, count, reading=True)
      bar.update(len(encoded.tokens))
  check_refused(refused, count)
  if not found:
    raise InputError(f'{field}: the text is empty: give text of the kind that the model will read and write')
  return sorted(found)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
  while batch := take(documents, BATCH_CHARS, BATCH_CHARS):
    yield batch
