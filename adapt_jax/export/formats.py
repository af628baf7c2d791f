"""The formats of an export, in one registry. A new one is a `Format` here, and a choice of export.formats."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from adapt_jax.config.values import K_QUANTS
from adapt_jax.export.gguf import check_gguf, write_gguf
from adapt_jax.export.gguf_quantise import check_quantiser, quantise
from adapt_jax.export.gguf_vocab import check_gguf_tokenizer
from adapt_jax.export.hf import write_hf
from adapt_jax.export.padded import padded_config, widest_config
from adapt_jax.machine.processes import decide, is_first
from adapt_jax.machine.progress import phase
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.gguf_model import STORED_DTYPES
from adapt_jax.models.network.llama import Params

_GGUF_TYPES = {dtype.name: kind.name for kind, dtype in STORED_DTYPES.items()}
Files = dict[str, str | None]  # file, or '' for the directory -> the type it is written in; None: as given


@dataclasses.dataclass(frozen=True)
class Content:
  """What every format is written from.

  Attributes:
    tokenizer: the tokenizer, or None.
    dtype: of the weights; None keeps each tensor's own.
    generation: fields of generation_config.json.
    gguf_types: types of .gguf files, as in the options.
    name: the model's name.
  """

  tokenizer: Any
  dtype: Any
  generation: dict[str, Any]
  gguf_types: tuple[str, ...]
  name: str

  def dtype_name(self, params: Params) -> str:
    """The dtype of most of the written weights."""
    return jnp.dtype(self.dtype or params['embed'].dtype).name


@dataclasses.dataclass(frozen=True)
class Format:
  """A way to write a model into a directory.

  Attributes:
    suffix: what its repository on the hub has after export.push.
    write: writes the directory, in every process, and returns its files of weights.
    shape: the config that is written; layers that differ from the model's are padded with zeros. Raises
      InputError if the format has none for the model.
    check: raises InputError if the format cannot hold a model of that config in these types of GGUF files.
    check_tokenizer: raises InputError for a tokenizer that it cannot hold.
  """

  suffix: str
  write: Callable[[Content, ModelConfig, Params, pathlib.Path], Files]
  shape: Callable[[ModelConfig], ModelConfig] = lambda config: config
  check: Callable[[ModelConfig, tuple[str, ...]], None] = lambda config, types: None
  check_tokenizer: Callable[[Any], None] = lambda tokenizer: None


def _write_hf(
  content: Content, config: ModelConfig, params: Params, new: pathlib.Path, code: bool = True
) -> Files:
  c = content
  write_hf(config, params, new, tokenizer=c.tokenizer, dtype=c.dtype, generation=c.generation, code=code)
  return {'': None if c.dtype is None else jnp.dtype(c.dtype).name}


def _write_gguf(content: Content, config: ModelConfig, params: Params, new: pathlib.Path) -> Files:
  """A file for each type. llama.cpp makes K-quants, from a file of the weights' own type."""
  auto = _GGUF_TYPES[content.dtype_name(params)]
  kinds = list(dict.fromkeys(auto if kind == 'auto' else kind for kind in content.gguf_types))
  files = {kind: new / f'model-{kind}.gguf' for kind in (*kinds, auto)}
  quantised = [kind for kind in kinds if kind in K_QUANTS]
  plain = dict.fromkeys([*(kind for kind in kinds if kind not in K_QUANTS), *([auto] if quantised else [])])
  for kind in plain:
    write_gguf(config, params, files[kind], tokenizer=content.tokenizer, kind=kind, name=content.name)
  for kind in quantised:
    with phase(f'quantising to {kind}'):
      decide(functools.partial(quantise, files[auto], files[kind], kind))
  if quantised and auto not in kinds and is_first():
    files[auto].unlink()
  return {files[kind].name: kind for kind in kinds}


def _check_gguf(config: ModelConfig, types: tuple[str, ...]) -> None:
  check_gguf(config)
  check_quantiser(types)


FORMATS = {
  'hf': Format('', _write_hf),
  'hf_padded': Format('-padded', functools.partial(_write_hf, code=False), padded_config),
  'gguf': Format('-GGUF', _write_gguf, check=_check_gguf, check_tokenizer=check_gguf_tokenizer),
  'gguf_padded': Format(
    '-padded-GGUF', _write_gguf, widest_config, _check_gguf, check_tokenizer=check_gguf_tokenizer
  ),
}
