"""The license of a model, as its model card or the header of its .gguf file names it."""

import pathlib
from collections.abc import Mapping
from typing import Any

from adapt_jax.models.errors import InputError, reading

# Field of a model card -> key of a .gguf file. Licenses that the hub does not list are `other`, with a name.
_KEYS = {
  'license': 'general.license',
  'license_name': 'general.license.name',
  'license_link': 'general.license.link',
}
_LONGEST = 500  # characters


def license_of_card(path: pathlib.Path) -> dict[str, str]:
  """`license`, `license_name` and `license_link`, as far as a README.md has them in its metadata."""
  from huggingface_hub import metadata_load  # imported here: few sources have a card

  try:
    with reading('model card', path):
      return _plain(metadata_load(path) or {})
  except InputError:
    return {}  # what others wrote into their card is no reason to refuse their model


def license_of_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
  """The same fields of a .gguf file's header."""
  return _plain({field: metadata.get(key) for field, key in _KEYS.items()})


def _plain(fields: Mapping[str, Any]) -> dict[str, str]:
  found = {field: fields.get(field) for field in _KEYS}
  return {k: v for k, v in found.items() if isinstance(v, str) and v.isprintable() and len(v) <= _LONGEST}
