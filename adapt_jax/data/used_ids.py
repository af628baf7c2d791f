"""The token ids that a text uses, from which a vocabulary is trimmed."""

import pathlib
import sys
from typing import Any

import numpy as np

from adapt_jax.data.documents import Source
from adapt_jax.data.token_cache import Need, open_caches
from adapt_jax.models.errors import InputError

_PART = 2**24  # tokens at once


def used_ids(
  source: Source,
  tokenizer: Any,
  field: str,
  *,
  text_field: str,
  messages_field: str,
  directory: pathlib.Path | None = None,
) -> list[int]:
  """All ids that occur when every document of a source is tokenised, in ascending order.

  All processes must call this. directory: as for `open_caches`. Raises InputError as `open_cache`, and for a
  text without tokens.
  """
  fields = {'text_field': text_field, 'messages_field': messages_field, 'field': field}
  caches = open_caches(directory, source, tokenizer, Need(sys.maxsize), **fields)
  used = np.zeros(1 + max(cache.highest for cache in caches), bool)
  for cache in caches:
    for start in range(0, len(cache.tokens), _PART):
      used[cache.tokens[start : start + _PART]] = True
  if not used.any():
    raise InputError(f'{field}: the text is empty: give text of the kind that the model will read and write')
  ids: list[int] = np.flatnonzero(used).tolist()
  return ids
