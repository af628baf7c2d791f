"""Mode bench: compares speed, memory and size of model.source with those of a dense model on this machine.

Prompts are random ids: the time of a step depends on shapes, not on the tokens. The models run in turn, so
that other load on the machine affects both, and each ratio is of two consecutive runs. Both models are kept
in memory. Without a dense model, `bench_widths` measures model.source alone.
"""

import dataclasses
import statistics
from typing import Any

import jax
import numpy as np

from adapt_jax.config.options import RunOptions
from adapt_jax.export.writer import lineage, origin
from adapt_jax.generation.generator import Generator, check_prompts
from adapt_jax.generation.in_turn import time_in_turn
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import check_model, load_source
from adapt_jax.models.config import ModelConfig, count_params
from adapt_jax.models.errors import InputError, reading
from adapt_jax.models.files import exists, local
from adapt_jax.models.formats.source import Source, open_config, open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.modes import bench_widths
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports.origin import Origin, origin_of
from adapt_jax.reports.report import RunReport, read_report, versions
from adapt_jax.reports.table import Table

_FASTER = 1.05  # a lower ratio of speeds is not a gain
_ALIGNED = {'gpu': 64, 'tpu': 128}  # widths that fill the tiles of their matrix units
_MODELS = ('dense', 'pruned')
Json = dict[str, Any]
MEASURED, PLANNED = 'peak measured on a device', "compiler's plan of the larger program, weights included"


@dataclasses.dataclass
class _Model:
  """A model being measured; the rates have one value per repeat, in tokens per second."""

  source: Source
  generator: Generator
  compiles: dict[str, int]
  peak_bytes: int = 0
  peak_how: str = PLANNED
  prefill: list[float] = dataclasses.field(default_factory=list)
  decode: list[float] = dataclasses.field(default_factory=list)


def _memory_stats() -> dict[str, int]:
  return jax.local_devices()[0].memory_stats() or {}  # none on a CPU


def _open(options: RunOptions) -> tuple[dict[str, Source], list[list[int]]]:
  """The models, and prompts for all; without 'dense' if model.source does not record its origin either."""
  b, pruned = options.bench, open_source(options.model.source)
  dense = b.dense or _origin(pruned)
  sources = ({'dense': open_source(dense, 'bench.dense')} if dense else {}) | {'pruned': pruned}
  configs = [source.config for source in sources.values()]
  ids = np.random.default_rng(options.seed).integers(
    0, min(config.vocab_size for config in configs), (b.batch, b.prompt_length)
  )
  for config in configs:
    check_model(config)
    check_prompts(config, ids.tolist(), b.new_tokens)
  return sources, ids.tolist()


def _origin(pruned: Source) -> str:
  """The name of the model that it was made from; '' if that is not recorded, or nothing was removed."""
  made_from = origin(pruned)
  made_by: RunReport = lineage(pruned) or made_from.report()
  after = made_by['model'].get('params_after', count_params(pruned.config))
  if made_from.params == after:  # padded formats hold more than the result
    return ''
  directory = pruned.path if pruned.path.is_dir() else pruned.path.parent
  if not made_from.hub and exists(report := directory.parent / 'report.json'):
    with reading('', report, 'set bench.dense'):
      told = origin_of(read_report(report))  # with its path, which exports do not tell
    made_from = told if told.params == made_from.params else made_from
  if not made_from.hub and not _is_model(made_from):
    raise InputError(
      f'bench.dense is empty, and {pruned.name} was made from {made_from.source!r}, which is not here: name '
      f'the model before pruning'
    )
  return made_from.source


def _is_model(made_from: Origin) -> bool:
  """Whether its path is here, and a model of as many parameters: exports tell only a name."""
  here = exists(local(made_from.source))
  return here and count_params(open_config(made_from.source, 'bench.dense')) == made_from.params


def _load(source: Source, options: RunOptions, prompts: list[list[int]]) -> _Model:
  """Loads, compiles and runs the model once, and measures its peak memory."""
  before = _memory_stats()
  dtype, compiler = compute_dtype(options.model.dtype), Compiler()
  params = load_source(source, dtype)
  generator = Generator(source.config, params, compiler=compiler, dtype=dtype, max_batch=options.bench.batch)
  generator.generate(prompts, options.bench.new_tokens)
  model = _Model(source, generator, compiler.counts, generator.planned_bytes())
  peak = _memory_stats().get('peak_bytes_in_use', 0)
  if peak > before.get('peak_bytes_in_use', 0):  # the peak is of the process: else an earlier model's
    model.peak_bytes, model.peak_how = peak - before.get('bytes_in_use', 0), MEASURED
  return model


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Measures both models, writes report.json and bench.md, and prints the table."""
  sources, prompts = _open(options)
  if 'dense' not in sources:
    bench_widths.run(options, sources['pruned'], prompts, workdir, command)
    return
  with workdir.claimed():
    b = options.bench
    # The pruned model first: the peak of the second, larger one is then above that of the first.
    models = {name: _load(sources[name], options, prompts) for name in reversed(_MODELS)}
    models = {name: models[name] for name in _MODELS}
    generators = [model.generator for model in models.values()]
    every = time_in_turn(generators, prompts, b.new_tokens, b.repeats, 'bench')
    for model, timings in zip(models.values(), every, strict=True):
      model.prefill = [one.prefill_rate for one in timings]
      model.decode = [one.decode_rate for one in timings]
    report: Json = {
      'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'backend': jax.default_backend(),
      'dtype': compute_dtype(options.model.dtype).name,
      'prompts': f'{b.batch} x {b.prompt_length} random ids, {b.new_tokens} new tokens each',
      'repeats': b.repeats,
      'models': {name: _figures(model) for name, model in models.items()},
      'ratio': {kind: _ratio(models, kind) for kind in ('prefill', 'decode')},
      'command': command,
      'versions': versions(),
    }
    report['warning'] = _warning(report, sources)
    bench_widths.finish(report, _table(report), workdir)


def _range(spread: dict[str, float], form: str) -> str:
  middle, low, high = (format(spread[name], form) for name in ('median', 'min', 'max'))
  return f'{middle} ({low}–{high})'


def _spread(values: list[float]) -> dict[str, float]:
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def _ratio(models: dict[str, _Model], kind: str) -> dict[str, float]:
  """Pruned over dense, of consecutive runs."""
  dense, pruned = (getattr(models[name], kind) for name in _MODELS)
  return _spread([p / d for p, d in zip(pruned, dense, strict=True)])


def _figures(model: _Model) -> dict[str, Any]:
  source = model.source
  return {
    'source': source.name,
    'params': count_params(source.config),
    'stored_bytes': source.stored_bytes(),
    'stored_as': 'GGUF' if source.path.suffix == '.gguf' else source.dtype,
    'prefill_tokens_per_second': _spread(model.prefill),
    'decode_tokens_per_second': _spread(model.decode),
    'peak_bytes': model.peak_bytes,
    'peak_how': model.peak_how,
    'compiles': model.compiles,
  }


def _warning(report: Json, sources: dict[str, Source]) -> str:
  """A warning if the pruned model is not faster, with the reason if it is known; else ''."""
  slow = {kind: r for kind, r in report['ratio'].items() if round(r['median'], 2) < _FASTER}
  if not slow:
    return ''
  ratios = ' and '.join(f'{kind} at {_range(r, ".2f")} times' for kind, r in slow.items())
  dense, pruned = (report['models'][name]['params'] for name in _MODELS)
  reason = unaligned(sources['pruned'].config, report['backend'])
  if not reason and pruned > 0.95 * dense:
    reason = f'it has {pruned / dense:.0%} of the parameters: prune more'
  if not reason and any(r['min'] < _FASTER <= r['max'] for r in slow.values()):
    reason = 'but the runs vary too much to be certain: measure again on an idle machine'
  return f"warning: not faster here: {ratios} the dense model's speed{'; ' * bool(reason)}{reason}"


def unaligned(config: ModelConfig, backend: str) -> str:
  """The widths that slow down a GPU or TPU, and the remedy; '' if there are none."""
  tile = _ALIGNED.get(backend, 1)
  odd = [s.ffn for s in config.layers if s.ffn % tile]
  if not odd:
    return ''
  return (
    f'MLP widths of {len(odd)} of {config.num_layers} layers, such as {odd[0]:,}, are not multiples of '
    f'{tile}: prune with prune.align_ffn = {tile}'
  )


def _table(report: Json) -> str:
  dense, pruned = (report['models'][name] for name in _MODELS)

  def rates(kind: str) -> list[str]:
    cells = [_range(model[f'{kind}_tokens_per_second'], ',.1f') for model in (dense, pruned)]
    return [f'{kind}, tokens/s', *cells, _range(report['ratio'][kind], '.2f')]

  def sizes(title: str, field: str) -> list[str]:
    a, b = dense[field], pruned[field]
    return [title, f'{a / 1e6:,.1f}', f'{b / 1e6:,.1f}', f'{b / a:.2f}']

  how = '; '.join(sorted({model['peak_how'] for model in (dense, pruned)}))
  rows = [
    rates('prefill'),
    rates('decode'),
    sizes('peak memory, MB', 'peak_bytes'),
    sizes(f'weights on disk ({dense["stored_as"]}, {pruned["stored_as"]}), MB', 'stored_bytes'),
    sizes('parameters, million', 'params'),
  ]
  warned = f'\n{report["warning"]}\n' if report['warning'] else ''
  return (
    f'{Table(["", "dense", "pruned", "pruned / dense"], rows).markdown()}\n\n'
    f'{report["device"]}, {report["dtype"]}; {report["prompts"]}; median (range) of {report["repeats"]} '
    f'runs, alternating models. Peak memory: {how}.\n{warned}'
  )


MODE = Mode(
  'bench',
  'compare speed and memory of model.source with a dense model, or measure latencies by width',
  run,
  result=('seed', 'model', 'bench', 'prune.attention'),
  reads=('mesh',),
)
