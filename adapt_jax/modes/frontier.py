"""Mode frontier: size, quality and speed of a dense model and smaller ones in types of GGUF files.

The files are written as mode export does, and measured by the real llama.cpp. A row, a model in one type, is
kept in WORKDIR/rows when it is measured, so that the same command continues, also with further models and
types. Speeds are measured at the end, in rounds over all files, so that other load affects all of them.
"""

import dataclasses
import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from adapt_jax.config.options import ExportOptions, RunOptions
from adapt_jax.config.values import K_QUANTS
from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation import llama_cpp
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.export.gguf import KINDS
from adapt_jax.export.writer import Writer, check_formats, check_tokenizer, lineage, origin
from adapt_jax.generation.generator import check_prompts
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import load_source
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import exists, local, new_file, read_json, write_text
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.modes.mode import Mode
from adapt_jax.modes.sizes import SIZES
from adapt_jax.pipeline.loader import Loader, evaluation_field
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import frontier as reports
from adapt_jax.reports import frontier_page
from adapt_jax.reports.report import versions, write_report

_REFERENCE = 'BF16'  # the type of the dense model that all others are compared with


@dataclasses.dataclass(frozen=True)
class Model:
  """A model to measure. label: in tables. key: of its files. export: its format and types."""

  source: Source
  label: str
  key: str
  tokenizer: Any
  export: ExportOptions

  def file(self, kind: str) -> pathlib.Path:
    """Its file of that type, in the workdir."""
    return pathlib.Path('models', self.key, self.export.formats[0], f'model-{kind}.gguf')


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Mode frontier: measures or resumes, writes the report in all formats, prints the table and the advice."""
  llama_cpp.check_installed()
  dense = open_source(options.model.source)
  loader = Loader(options, dense, dense.load_tokenizer())
  models = open_models(options, dense, loader.tokenizer)
  texts = loader.evaluation()
  if not texts:
    raise InputError('evaluate.source is empty, but mode frontier measures perplexity: name a text')

  def digests() -> dict[str, str]:
    of_texts = {evaluation_field(name): blocks.digest() for name, blocks in texts.items()}
    return {'model.source': dense.model_digest()} | of_texts

  with workdir.claimed(digests):
    report = Frontier(options, models, texts, workdir, command).execute()
    print(f'\n{reports.text(report, ranges=False)}\n\nreport with charts: {workdir.page}')


def open_models(options: RunOptions, dense: Source, tokenizer: Any) -> list[Model]:
  """The dense model and the others, each once, opened and checked. Raises InputError."""
  kinds = tuple(kind.upper() for kind in options.frontier.types)
  first = _open(dense, tokenizer, 'dense', tuple(dict.fromkeys((_REFERENCE, *kinds))))
  found = {first.key: first}
  for name in (model for asked in options.frontier.models for model in _sizes(asked)):
    source = open_source(name, 'frontier.models')
    label = f'{count_params(source.config) / count_params(dense.config):.0%}'.replace('%', ' %')
    model = _open(source, source.load_tokenizer(), label, kinds)
    small, large = sorted((model.tokenizer.get_vocab().items(), tokenizer.get_vocab().items()), key=len)
    if source.config.vocab_size != dense.config.vocab_size or not small <= large:
      raise InputError(f'frontier.models: {name} has other tokens than model.source: leave it out')
    found.setdefault(model.key, model)
  labels, models = [model.label for model in found.values()], []
  for model in found.values():
    same = labels.count(model.label) > 1
    models.append(dataclasses.replace(model, label=f'{model.label} {model.key}') if same else model)
  for model in models:
    b = options.bench
    check_prompts(model.source.config, [[0] * b.prompt_length], b.new_tokens)
  return models


def _sizes(name: str) -> list[str]:
  """The sizes in the workdir of a run of several; otherwise the model itself."""
  found = sorted(str(path.parent) for path in local(name).glob(f'{SIZES}/*/run.json'))
  return found[::-1] or [name]


def _open(source: Source, tokenizer: Any, label: str, kinds: tuple[str, ...]) -> Model:
  """The model, in the format of llama.cpp that holds it: padded only if no other does."""
  path = pathlib.PurePath(source.name)
  path = path.parent if path.name == 'hf' else path
  key = f'{path.name.removesuffix(".gguf")}-{source.model_digest()[:8]}'
  export = ExportOptions(formats=('gguf',), gguf_types=kinds)
  try:
    check_formats(export, source.config)
  except InputError:
    export = dataclasses.replace(export, formats=('gguf_padded',))
    check_formats(export, source.config)
  check_tokenizer(export, tokenizer)
  return Model(source, label, key, tokenizer, export)


class Frontier:
  """One measurement, in a claimed workdir. models: of `open_models`. command: that which reproduces it."""

  def __init__(
    self,
    options: RunOptions,
    models: list[Model],
    texts: dict[str, Blocks],
    workdir: Workdir,
    command: str,
  ):
    self._options, self._models, self._texts = options, models, texts
    self._workdir, self._command = workdir, command
    self._threads = options.frontier.threads or llama_cpp.threads_here()
    self._rows = [(model, kind) for model in models for kind in model.export.gguf_types]
    self._count = sum(len(blocks.tokens) for blocks in texts.values())
    self._windows, self._reference = (workdir.path / name for name in ('windows.npz', 'reference.npy'))
    self._speeds = workdir.path / 'speeds.json'

  def execute(self) -> reports.FrontierReport:
    """Measures what is missing, writes the report in all formats and returns it."""
    todo = [row for row in self._rows if not exists(self._row(*row))]
    if done := len(self._rows) - len(todo):
      print(f'{done} of {len(self._rows)} files are measured', flush=True)
    for model in self._models:
      self._write_files(model)
    if todo:
      self._measure(todo)
    report = self._report(self._time())
    frontier_page.write(self._workdir.path, report, running=False)
    write_report(self._workdir.report, report)
    return report

  def _row(self, model: Model, kind: str) -> pathlib.Path:
    return self._workdir.path / 'rows' / f'{model.key}-{kind}.json'

  def _write_files(self, model: Model) -> None:
    """Writes the model's files, unless all are there. Types of an earlier command are kept."""
    path, asked = self._workdir.path, model.export.gguf_types
    if all(exists(path / model.file(kind)) for kind in asked):
      return
    preemption.check()
    others = (kind for kind in (*KINDS, *K_QUANTS) if exists(path / model.file(kind)))
    export = dataclasses.replace(model.export, gguf_types=tuple(dict.fromkeys((*asked, *others))))
    source = model.source
    report = lineage(source) or origin(source).report()
    fields: dict[str, Any] = {'tokenizer': model.tokenizer, 'dtype': None, 'generation': source.generation}
    writer = Writer(export, path / 'models' / model.key, report=report, **fields)
    writer.write(source.config, load_source(source, None))

  def _measure(self, todo: list[tuple[Model, str]]) -> None:
    """Measures the quality of these files; first, if its predictions are not there, of the reference."""
    llama_cpp.save_windows(self._windows, [*self._texts.values()])
    reference = self._rows[0]
    if not exists(self._reference):
      with new_file(self._reference) as new:
        self._measure_one(*reference, new, writes=True)
    for i, (model, kind) in enumerate(todo, 1):
      if (model, kind) != reference:
        self._measure_one(model, kind, self._reference, writes=False)
      print(f'{model.label} in {kind}: file {i} of {len(todo)} is measured', flush=True)
      frontier_page.write(self._workdir.path, self._report(), running=True)
    self._reference.unlink()  # two bytes for each id and token
    self._windows.unlink()

  def _measure_one(self, model: Model, kind: str, reference: pathlib.Path, *, writes: bool) -> None:
    preemption.check()
    start, file = time.monotonic(), self._workdir.path / model.file(kind)
    with Progress(f'{model.label} in {kind}', self._count, 'windows') as progress:
      advance = functools.partial(progress.update, 1)
      common: dict[str, Any] = {'writes': writes, 'threads': self._threads, 'advance': advance}
      found = llama_cpp.quality(file, self._windows, reference, **common)
    row = {
      'bytes': file.stat().st_size,
      'texts': dict(zip(self._texts, found, strict=True)),
      'seconds': time.monotonic() - start,
    }
    write_text(self._row(model, kind), json.dumps(row, indent=2) + '\n')

  def _time(self) -> dict[str, list[list[float]]]:
    """Tokens per second of prefill and decode of each file, by round; measures the rounds that are missing.

    Rounds of other files, threads or lengths are measured anew.
    """
    b, names = self._options.bench, [self._row(*row).stem for row in self._rows]
    lengths = {'prompt_length': b.prompt_length, 'new_tokens': b.new_tokens}
    settings = {'files': names, 'threads': self._threads, **lengths}
    known = read_json(self._speeds, 'delete it') if exists(self._speeds) else {}
    rounds: list[list[list[float]]] = known['rounds'] if known.get('settings') == settings else []
    with Progress('speed', max(0, b.repeats - len(rounds)) * len(names), 'runs') as progress:
      while len(rounds) < b.repeats:
        found = []
        for model, kind in self._rows:
          preemption.check()
          file = self._workdir.path / model.file(kind)
          found.append(llama_cpp.speed(file, threads=self._threads, seed=self._options.seed, **lengths))
          progress.update(1, file=f'{model.label} in {kind}', decode=f'{found[-1][1]:,.1f}')
        rounds.append(found)
        write_text(self._speeds, json.dumps({'settings': settings, 'rounds': rounds}) + '\n')
    return {name: [found[i] for found in rounds[: b.repeats]] for i, name in enumerate(names)}

  def _report(self, speeds: dict[str, list[list[float]]] | None = None) -> reports.FrontierReport:
    """The contents of report.json, as far as files are measured."""
    rows, seconds, zero = [], 0.0, dict[str, float]()
    for model, kind in self._rows:
      if not exists(self._row(model, kind)):
        continue
      kept = read_json(self._row(model, kind), 'delete it to measure the file again')
      zero = zero or {name: figures['loss'] for name, figures in kept['texts'].items()}
      seconds += kept['seconds']
      rows.append(_figures(model, kind, kept, zero))
      if speeds:
        rates = zip(*speeds[self._row(model, kind).stem], strict=True)
        rows[-1]['prefill'], rows[-1]['decode'] = (_spread(of) for of in rates)
    b, dense = self._options.bench, self._models[0].source
    evaluators = {
      name: Evaluator(blocks, 1, compiler=Compiler(), dtype=compute_dtype('auto'))
      for name, blocks in self._texts.items()
    }
    return {
      'model': {'source': dense.name, 'params_before': count_params(dense.config)},
      'reference': f'the dense model in {_REFERENCE}',
      'advice': reports.mark(rows),
      'rows': rows,
      'definitions': {name: evaluator.definition for name, evaluator in evaluators.items()},
      'threads': self._threads,
      'request': f'a prompt of {b.prompt_length:,} tokens and {b.new_tokens:,} tokens after it',
      'repeats': b.repeats,
      'seconds': seconds,
      'command': self._command,
      'versions': versions(llama_cpp.DISTRIBUTION),
    }


def _figures(model: Model, kind: str, kept: dict[str, Any], zero: dict[str, float]) -> reports.FrontierRow:
  """A row without speeds. kept: what is stored of it. zero: the losses of the reference by text."""
  texts: dict[str, reports.TextFigures] = {
    name: {
      'perplexity': math.exp(min(found['loss'], 700)),
      'loss_increase': found['loss'] - zero[name],
      'kl': found['kl'],
    }
    for name, found in kept['texts'].items()
  }
  return {
    'model': model.label,
    'type': kind,
    'source': model.source.name,
    'params': count_params(model.source.config),
    'file': str(model.file(kind)),
    'bytes': kept['bytes'],
    'texts': texts,
    'loss_increase': statistics.fmean(text['loss_increase'] for text in texts.values()),
    'kl': statistics.fmean(text['kl'] for text in texts.values()),
    'best_for': [],
  }


def _spread(rates: Sequence[float]) -> reports.Spread:
  return {'median': statistics.median(rates), 'min': min(rates), 'max': max(rates)}


# Models, types and threads are no part of the result: each row has its own file.
MODE = Mode(
  'frontier',
  'compare size, quality and speed of model.source and smaller models in types of GGUF files',
  run,
  result=('model.source', 'data', 'evaluate.source', 'evaluate.length', 'evaluate.max_tokens'),
  reads=('seed', 'frontier', 'bench.prompt_length', 'bench.new_tokens', 'bench.repeats'),
  mesh=False,
  grows=True,
)
