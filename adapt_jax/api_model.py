"""The library's model: a `Model` in memory, read by `load` and written by `save`."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from adapt_jax.config.build import from_dict
from adapt_jax.data.chat_templates import with_template
from adapt_jax.export.push import check_hub
from adapt_jax.export.push import push as upload
from adapt_jax.export.writer import Writer, check_formats, check_tokenizer, origin
from adapt_jax.machine import mesh, processes
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.files import local
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.llama import Params
from adapt_jax.reports.origin import Origin


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A decoder: parameters as a plain pytree (`adapt_jax.models.network.llama`), and their description.

  dtype: dtype of the original checkpoint, also used by `save`. generation: fields of generation_config.json.
  origin: where it comes from: name, license and sizes of the model before anything was removed.
  """

  config: ModelConfig
  params: Params
  tokenizer: Any = None
  dtype: str = 'float32'
  generation: dict[str, Any] = dataclasses.field(default_factory=dict)
  origin: Origin = Origin('model')

  def __post_init__(self) -> None:
    object.__setattr__(self, 'origin', self.origin.sized(self.config))

  @property
  def name(self) -> str:
    """Name of the model that it was made from."""
    return self.origin.source

  @property
  def dense(self) -> int:
    """Stored parameters before anything was removed."""
    return self.origin.params

  @property
  def num_params(self) -> int:
    """Stored parameters; a tied embedding counts once."""
    return count_params(self.config)

  def __repr__(self) -> str:
    layers = f'{self.config.num_layers} layers of width {self.config.hidden_size}'
    return f'Model({self.name!r}, {self.num_params:,} parameters, {layers}, {self.config.family})'


def load(
  source: str | os.PathLike[str], dtype: Any = None, *, chat_template: str = '', progress: bool = False
) -> Model:
  """A model from a hub id, a Hugging Face directory, a .gguf file or the workdir of a run.

  `dtype` None keeps each tensor's own; GGUF files, whose weights may be quantised, are read as float32.
  chat_template: empty for the tokenizer's own; plain, paper or a Jinja file. Raises InputError for what
  cannot be read or is not supported.
  """
  wanted = None if dtype is None else jnp.dtype(dtype)
  from_dict({'export': {'dtype': 'auto' if wanted is None else wanted.name}})  # checks it
  opened = open_source(os.fspath(source))
  tokenizer = with_template(opened.load_tokenizer(), chat_template)
  mesh.check_model(opened.config)
  with processes.silent(not progress):
    params = mesh.load_source(opened, wanted)
    return Model(opened.config, params, tokenizer, opened.dtype, opened.generation, origin(opened))


def save(
  model: Model,
  directory: str | os.PathLike[str],
  *,
  formats: str | Sequence[str] = ('hf',),
  dtype: str = 'auto',
  gguf_types: str | Sequence[str] = ('auto',),
  push: str = '',
  progress: bool = False,
) -> dict[str, dict[str, Any]]:
  """Writes directory/FORMAT for each format, reads it back and compares it; returns facts about each.

  formats: hf (transformers, vLLM, MLX-LM), hf_padded, gguf (llama.cpp), gguf_padded, as `export.formats`.
  dtype auto: `model.dtype`. A directory is complete or absent, and replaces an older one; `load(directory)`
  reads its hf/. push: hub repository org/name to upload them to afterwards, as `export.push`. Raises
  InputError for a format that cannot represent the model, and if the hub refuses the upload.
  """
  target = local(os.fspath(directory))
  asked = {'formats': formats, 'dtype': dtype, 'gguf_types': gguf_types, 'push': push}
  options = from_dict({'export': asked}).export
  check_formats(options, model.config)
  check_tokenizer(options, model.tokenizer)
  check_hub(options)
  writer = Writer(
    options,
    target,
    tokenizer=model.tokenizer,
    dtype=jnp.dtype(model.dtype if options.dtype == 'auto' else options.dtype),
    generation=model.generation,
    report=model.origin.report(),
  )
  with processes.silent(not progress):
    written = writer.write(model.config, model.params)
    upload(options, target, again='call save again')
  return written
