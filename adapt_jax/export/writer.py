"""Writes a model in the export formats, one after another, and collects facts on them for the report."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp

from adapt_jax.config.options import ExportOptions
from adapt_jax.export.card import model_card
from adapt_jax.export.gguf import check_gguf, write_gguf
from adapt_jax.export.gguf_quantise import K_QUANTS, check_quantiser, quantise
from adapt_jax.export.gguf_vocab import check_gguf_tokenizer
from adapt_jax.export.hf import write_hf
from adapt_jax.export.padded import pad, padded_config, widest_config
from adapt_jax.export.push import repositories
from adapt_jax.export.verify import check
from adapt_jax.machine import mesh
from adapt_jax.machine.processes import decide, is_first, say
from adapt_jax.machine.progress import phase
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.files import beside, exists, new_directory, read_json, write_text
from adapt_jax.models.formats.gguf_model import STORED_DTYPES
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.llama import Params
from adapt_jax.reports.report import RunReport

_GGUF_TYPES = {dtype.name: kind.name for kind, dtype in STORED_DTYPES.items()}
Written = dict[str, dict[str, Any]]  # file, or '' for the directory -> facts about it
LINEAGE = 'lineage.json'  # in each directory: the report of the run that made the model


def check_formats(options: ExportOptions, config: ModelConfig) -> None:
  """Checks that this model can be written in the requested formats. Raises InputError."""
  if 'hf_padded' in options.formats:
    padded_config(config)
  if 'gguf' in options.formats:
    check_gguf(config)
  if 'gguf_padded' in options.formats:
    check_gguf(widest_config(config), 'gguf_padded')
  if {'gguf', 'gguf_padded'} & {*options.formats}:
    check_quantiser(options.gguf_types)


def check_result(options: ExportOptions, config: ModelConfig, whole_layers: bool = False) -> None:
  """Checks a run's result in advance: it has the biases of `config`, but layers of different widths.

  With `whole_layers` it has fewer layers instead, the first of which may be gone or not. Raises InputError.
  """
  first, *others = config.layers
  wider = dataclasses.replace(first, ffn=first.ffn + 1)
  for layers in (config.layers, others or [first]) if whole_layers else ([wider, *others],):
    check_formats(options, config.with_layers(tuple(layers)))


def check_tokenizer(options: ExportOptions, tokenizer: Any) -> None:
  """Checks that the requested formats can hold the tokenizer. Raises InputError."""
  if {'gguf', 'gguf_padded'} & {*options.formats}:
    check_gguf_tokenizer(tokenizer)


def lineage(source: Source) -> RunReport | None:
  """The report of the run that made a model, which our exports store with the weights; None for others.

  It is of the files of weights that it names with their sizes; those of version 0.1 name none. Raises
  InputError for one that no model card can be made of.
  """
  path = (source.path if source.path.is_dir() else source.path.parent) / LINEAGE
  found: Any = read_json(path) if exists(path) else {}
  model = found.get('model')
  files = found.pop('files', None)
  if not isinstance(model, dict) or not isinstance(model.get('source'), str):
    return None
  if isinstance(files, dict) and not _sizes(source.reader.files).items() <= files.items():
    say(f'{path} is of other weights: the origin of {source.name} is not known')
    return None
  try:
    model_card(found, source.config, ()).encode()
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise InputError(
      f'{path}: is damaged ({type(error).__name__}: {first_line(error)}): restore it, or delete it to use '
      f'the model without its origin'
    ) from None
  return found


def _sizes(files: Iterable[pathlib.Path]) -> dict[str, int]:
  """Bytes by name of the file."""
  return {file.name: file.stat().st_size for file in files}


def written_dtype(options: ExportOptions, source_dtype: str, trained: bool) -> Any:
  """dtype of the written weights; None keeps each tensor's own, if training has not made them fp32."""
  if options.dtype == 'auto' and not trained:
    return None
  return jnp.dtype(source_dtype if options.dtype == 'auto' else options.dtype)


class Writer:
  """Writes a model into DIRECTORY/<format>, for each requested format.

  Each directory is complete or absent; it appears only if the model read back from it agrees.

  Args:
    tokenizer: the tokenizer, or None.
    dtype: of the weights; None keeps each tensor's own.
    generation: fields of generation_config.json.
    report: of the run, or what is known of a model's origin; also written as `LINEAGE` and, for readers, as
      a model card.
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
    self._tokenizer, self._dtype, self._generation = tokenizer, dtype, generation
    self._report = report

  def write(self, config: ModelConfig, params: Params) -> Written:
    """{what was written: {bytes, largest logit difference ...}}. Raises InputError if it does not agree.

    Every process must call it; the parameters may be sharded over processes.
    """
    found: Written = {}
    repos = repositories(self._options)
    for name in self._options.formats:
      path = self._directory / name
      with new_directory(path) if is_first() else contextlib.nullcontext(beside(path)) as new:
        with phase(f'writing {name}'):
          written = _WRITERS[name](self, config, params, new)
        if is_first():
          weights = [*new.glob('*.safetensors'), *new.glob('*.gguf')]
          stored = {**self._report, 'files': _sizes(weights)}
          write_text(new / LINEAGE, json.dumps(stored, indent=2) + '\n')
          files = sorted(file.name for file in new.iterdir())
          write_text(new / 'README.md', model_card(self._report, config, files, repos.get(name, '')))
      for file, values in written.items():
        found[f'{name}/{file}'.rstrip('/')] = values
        say(_line(path / file, values))
    return found

  def _write_hf(self, config: ModelConfig, params: Params, new: pathlib.Path) -> Written:
    self._hf(config, params, new, code=True)
    return {'': self._compare_hf(config, params, new)}

  def _write_padded(self, config: ModelConfig, params: Params, new: pathlib.Path) -> Written:
    wide = padded_config(config)
    self._hf(wide, _padded(wide, params), new, code=False)
    return {'': self._compare_hf(config, params, new) | _zeros(wide, config)}

  def _hf(self, config: ModelConfig, params: Params, new: pathlib.Path, code: bool) -> None:
    options = {'tokenizer': self._tokenizer, 'dtype': self._dtype, 'generation': self._generation}
    write_hf(config, params, new, code=code, **options)

  def _write_gguf(self, config: ModelConfig, params: Params, new: pathlib.Path) -> Written:
    return self._compare_gguf(config, params, self._gguf_files(config, params, new))

  def _gguf_files(self, config: ModelConfig, params: Params, new: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes a file for each type; returns them by type."""
    auto = _GGUF_TYPES[self._dtype_name(params)]
    kinds = list(dict.fromkeys(auto if kind == 'auto' else kind for kind in self._options.gguf_types))
    files = {kind: new / f'model-{kind}.gguf' for kind in (*kinds, auto)}
    quantised = [kind for kind in kinds if kind in K_QUANTS]
    name = pathlib.Path(self._report['model']['source']).name
    for kind in dict.fromkeys([*(k for k in kinds if k not in K_QUANTS), *([auto] if quantised else [])]):
      write_gguf(config, params, files[kind], tokenizer=self._tokenizer, kind=kind, name=name)
    for kind in quantised:
      with phase(f'quantising to {kind}'):
        decide(functools.partial(quantise, files[auto], files[kind], kind))
    if quantised and auto not in kinds and is_first():
      files[auto].unlink()
    return {kind: files[kind] for kind in kinds}

  def _compare_gguf(self, config: ModelConfig, params: Params, files: dict[str, pathlib.Path]) -> Written:
    return {
      file.name: {'type': kind} | self._compare(config, params, file, kind) for kind, file in files.items()
    }

  def _write_gguf_padded(self, config: ModelConfig, params: Params, new: pathlib.Path) -> Written:
    wide = widest_config(config)
    files = self._gguf_files(wide, _padded(wide, params), new)
    found = self._compare_gguf(config, params, files)
    return {file: facts | _zeros(wide, config) for file, facts in found.items()}

  def _dtype_name(self, params: Params) -> str:
    return jnp.dtype(self._dtype or params['embed'].dtype).name

  def _compare_hf(self, config: ModelConfig, params: Params, new: pathlib.Path) -> dict[str, Any]:
    kind = None if self._dtype is None else jnp.dtype(self._dtype).name
    return {'type': self._dtype_name(params)} | self._compare(config, params, new, kind)

  def _compare(
    self, config: ModelConfig, params: Params, path: pathlib.Path, kind: str | None
  ) -> dict[str, Any]:
    decide(lambda: None)  # waits until the first process has written
    agreement = check(config, params, path, self._tokenizer, kind)
    size = decide(lambda: open_source(str(path)).stored_bytes())
    return {'bytes': size, **dataclasses.asdict(agreement)}


def _padded(wide: ModelConfig, params: Params) -> Params:
  padded: Params = mesh.jit(functools.partial(pad, wide), params)(params)
  return padded


def _zeros(wide: ModelConfig, config: ModelConfig) -> dict[str, int]:
  return {'params': count_params(wide), 'params_without_zeros': count_params(config)}


def _line(path: pathlib.Path, found: dict[str, Any]) -> str:
  text = (
    f'{path}: {found["bytes"] / 1e6:,.1f} MB of {found["type"]}, read back: largest logit difference '
    f'{found["logit_difference"]:.2g}, same token at {found["same_token"]:.1%} of positions'
  )
  if found['logit_difference'] and found['type'] not in ('float32', 'F32'):  # `check` refuses what is more
    text += f' (expected from rounding the weights to {found["type"]})'
  if 'params_without_zeros' in found:
    zeros = found['params'] / found['params_without_zeros'] - 1
    text += f'; {found["params"]:,} parameters, zeros add {zeros:.1%}'
  return text


_WRITERS: dict[str, Callable[[Writer, ModelConfig, Params, pathlib.Path], Written]] = {
  'hf': Writer._write_hf,
  'hf_padded': Writer._write_padded,
  'gguf': Writer._write_gguf,
  'gguf_padded': Writer._write_gguf_padded,
}
