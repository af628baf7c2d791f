"""Writes a model in the export formats, one after another, and collects facts on them for the report."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from adapt_jax.config.options import ExportOptions
from adapt_jax.export.card import model_card
from adapt_jax.export.formats import FORMATS, Content
from adapt_jax.export.padded import pad
from adapt_jax.export.push import repositories
from adapt_jax.export.verify import check
from adapt_jax.machine import mesh
from adapt_jax.machine.processes import decide, is_first, say
from adapt_jax.machine.progress import phase
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError, disk_full, first_line, reading
from adapt_jax.models.files import beside, exists, new_directory, read_json, write_text
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.llama import Params
from adapt_jax.reports.origin import Origin, origin_of, without_paths
from adapt_jax.reports.report import RunReport

Written = dict[str, dict[str, Any]]  # file, or '' for the directory -> facts about it
LINEAGE = 'lineage.json'  # in each directory: the report of the run that made the model


def check_formats(options: ExportOptions, config: ModelConfig) -> None:
  """Raises InputError if this model cannot be written in one of the requested formats."""
  for name in options.formats:
    try:
      FORMATS[name].check(FORMATS[name].shape(config), options.gguf_types)
    except InputError as error:
      raise InputError(f'export.formats has {name!r}: {error}') from None


def check_result(options: ExportOptions, config: ModelConfig, whole_layers: bool = False) -> None:
  """Checks a run's result in advance: it has the biases of `config`, but layers of different widths.

  With `whole_layers` it has fewer layers instead, the first of which may be gone or not. Raises InputError.
  """
  first, *others = config.layers
  wider = dataclasses.replace(first, ffn=first.ffn + 1)
  for layers in (config.layers, others or [first]) if whole_layers else ([wider, *others],):
    check_formats(options, config.with_layers(tuple(layers)))


def check_tokenizer(options: ExportOptions, tokenizer: Any) -> None:
  """Raises InputError if one of the requested formats cannot hold the tokenizer."""
  for name in options.formats:
    FORMATS[name].check_tokenizer(tokenizer)


def lineage(source: Source) -> RunReport | None:
  """The report of the run that made a model, which our exports store with the weights; None for others.

  It lists the weight files that it describes, with their sizes. Raises InputError for one that no model card
  can be made of.
  """
  path = (source.path if source.path.is_dir() else source.path.parent) / LINEAGE
  if not exists(path):
    return None
  remedy = 'restore it, or delete it to use the model without its origin'
  with reading('', path, remedy):
    found: Any = read_json(path, remedy)
    if 'origin' not in found:
      return None
    if not _sizes(source.reader.files).items() <= found.pop('files').items():
      say(f'{path} is of other weights: the origin of {source.name} is not known')
      return None
    model_card(found, source.config, ()).encode()
    report: RunReport = found
  return report


def origin(source: Source) -> Origin:
  """The model from which a source was made, by its `lineage`; the source itself if we did not make it.

  Raises InputError.
  """
  own, made_by = Origin(source.name, source.hub, source.license).sized(source.config), lineage(source)
  first = origin_of(made_by) if made_by else own
  return own if source.hub and not first.hub else first  # an id is of more use than a name


def _sizes(files: Iterable[pathlib.Path]) -> dict[str, int]:
  """Bytes by name of the file."""
  return {file.name: file.stat().st_size for file in files}


def written_dtype(options: ExportOptions, source: Source, trained: bool) -> Any:
  """dtype of the written weights; None keeps each tensor's own.

  export.dtype = auto keeps the source's dtype; a quantised source becomes bfloat16. trained: whether training
  has made the weights fp32.
  """
  if options.dtype != 'auto':
    return jnp.dtype(options.dtype)
  return jnp.dtype(source.dtype) if trained or source.quantised else None


class Writer:
  """Writes a model into DIRECTORY/<format>, for each requested format.

  Each directory is complete or absent; it appears only if the model read back from it agrees.

  Args:
    tokenizer: the tokenizer, or None.
    dtype: of the weights; None keeps each tensor's own.
    generation: fields of generation_config.json.
    report: of the run, or `Origin.report`; also written as `LINEAGE` and, for readers, as a model card, both
      without local paths.
  """

  def __init__(
    self,
    options: ExportOptions,
    directory: pathlib.Path,
    *,
    tokenizer: Any,
    dtype: Any,
    generation: dict[str, Any],
    report: RunReport,
  ):
    self._options, self._directory = options, directory
    self._report: RunReport = without_paths(report)
    name = pathlib.PurePath(origin_of(self._report).source).name
    self._content = Content(tokenizer, dtype, generation, options.gguf_types, name)

  def write(self, config: ModelConfig, params: Params) -> Written:
    """{what was written: {bytes, largest logit difference ...}}. Raises InputError if it does not agree.

    Every process must call it; the parameters may be sharded over processes.
    """
    written: Written = {}
    for name in self._options.formats:
      path = self._directory / name
      try:
        with new_directory(path) if is_first() else contextlib.nullcontext(beside(path)) as new:
          files = self._write(name, config, params, new)
      except OSError as error:
        if disk_full(error):
          raise  # `main.py` reports it, whatever was being written
        raise InputError(f'{path}: cannot be written ({first_line(error)}): choose another place') from None
      for file, facts in files.items():
        written[f'{name}/{file}'.rstrip('/')] = facts
        say(_line(path / file, facts))
    return written

  def _write(self, name: str, config: ModelConfig, params: Params, new: pathlib.Path) -> Written:
    shape = FORMATS[name].shape(config)
    padded = params if shape == config else mesh.jit(functools.partial(pad, shape), params)(params)
    with phase(f'writing {name}'):
      files = FORMATS[name].write(self._content, shape, padded, new)
    del padded
    zeros = {'params': count_params(shape), 'params_without_zeros': count_params(config)}
    facts = {
      file: self._compare(config, params, new / file, kind) | (zeros if shape != config else {})
      for file, kind in files.items()
    }
    if is_first():
      weights = [*new.glob('*.safetensors'), *new.glob('*.gguf')]
      write_text(new / LINEAGE, json.dumps({**self._report, 'files': _sizes(weights)}, indent=2) + '\n')
      names = sorted(file.name for file in new.iterdir())
      repo = repositories(self._options).get(name, '')
      write_text(new / 'README.md', model_card(self._report, config, names, repo))
    return facts

  def _compare(
    self, config: ModelConfig, params: Params, path: pathlib.Path, kind: str | None
  ) -> dict[str, Any]:
    decide(lambda: None)  # waits until the first process has written
    agreement = check(config, params, path, self._content.tokenizer, kind)
    size = decide(lambda: open_source(str(path)).stored_bytes())
    return {'type': kind or self._content.dtype_name(params), 'bytes': size, **agreement}


def _line(path: pathlib.Path, facts: dict[str, Any]) -> str:
  text = (
    f'{path}: {facts["bytes"] / 1e6:,.1f} MB of {facts["type"]}, read back: largest logit difference '
    f'{facts["logit_difference"]:.2g}, same token at {facts["same_token"]:.1%} of positions'
  )
  if facts['logit_difference'] and facts['type'] not in ('float32', 'F32'):  # `check` refuses what is more
    text += f' (expected from rounding the weights to {facts["type"]})'
  if 'params_without_zeros' in facts:
    zeros = facts['params'] / facts['params_without_zeros'] - 1
    text += f'; {facts["params"]:,} parameters, zeros add {zeros:.1%}'
  return text
