"""Trims the vocabulary of a model to the tokens of a text, for command and library."""

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from adapt_jax.generation.sampling import stop_ids
from adapt_jax.machine import mesh
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.trimmed_tokenizer import (
  ids_with_rows,
  needed_ids,
  trim_tokenizer,
  trimmed_generation,
)
from adapt_jax.models.network.llama import Params


class Trim(NamedTuple):
  """The tokens that a trimmed model keeps, and what it has instead of the model's own.

  rows: the model's id of each new id, int64 [V]. generation: fields of generation_config.json.
  """

  rows: np.ndarray
  config: ModelConfig
  tokenizer: Any
  generation: dict[str, Any]

  def cut(self, params: Params) -> Params:
    """The parameters with only these rows of embedding and head."""

    def keep(params: Params) -> Params:
      return params | {name: params[name][self.rows] for name in ('embed', 'lm_head') if name in params}

    small: Params = mesh.jit(keep, params, once=True)(params)
    return small


def trim(config: ModelConfig, tokenizer: Any, generation: dict[str, Any], used: Collection[int]) -> Trim:
  """Keeps the ids in `used`, those that end a text, and those that these need.

  Predictions are the model's on the condition that the next token is one of these: softmax over fewer logits.
  Raises InputError for a tokenizer that cannot be trimmed, and for one of another model.
  """
  ids = needed_ids(tokenizer, {*used, *stop_ids(generation, tokenizer)})
  rows = np.array(ids_with_rows(config, ids, tokenizer), np.int64)
  small = dataclasses.replace(config, vocab_size=len(rows))
  return Trim(rows, small, trim_tokenizer(tokenizer, ids), trimmed_generation(generation, ids))
