"""Mode bench without a dense model to compare with: seconds of a request by the widths of the layers.

The model is run with all layers at one smaller width after another, and with half of its layers; each runs in
turn with the whole model, so that other load on the machine affects both. Differences of these times are the
table that a prune.target in latency, ms or tok/s needs (`pruning.latency`). Whole models are measured,
because a block by itself finds its weights in the caches of the processor.
"""

import dataclasses
import datetime
import statistics
from typing import Any

import numpy as np

from adapt_jax.config.options import RunOptions
from adapt_jax.generation.generator import Generator, Timings
from adapt_jax.generation.in_turn import time_in_turn
from adapt_jax.machine import mesh
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import load_source
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import write_text
from adapt_jax.models.formats.source import Source
from adapt_jax.models.network import sharding
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import latency, surgery
from adapt_jax.pruning.attention_units import UNITS_BY_NAME, AttentionUnit, find_unit
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.reports.report import versions, write_report
from adapt_jax.reports.table import Table

_SHARES = (0.125, 0.25, 0.5, 0.75)  # of the full width
_KINDS = ('prefill', 'decode')
Seconds = dict[str, float]  # of a prefill, and of a decoding step
Json = dict[str, Any]


def widths_of(full: int) -> list[int]:
  """The smaller widths that are measured, ascending: round ones that the mesh can split."""
  found = sharding.mesh()
  tensor = found.shape['tensor'] if found is not None else 1
  step = max(
    (step for step in (64, 32, 16, 8, 4, 2) if full >= 8 * step and not step % tensor), default=tensor
  )
  return sorted({max(round(share * full / step), 1) * step for share in _SHARES} - {full})


def narrowed(config: ModelConfig, units: int, ffn: int, layers: int, unit: AttentionUnit) -> PrunePlan:
  """The plan that keeps the first units of attention and the first channels of the first layers."""
  kept = np.arange(config.num_layers) < layers
  return PrunePlan(
    tuple((np.arange(unit.count(s)) < units) & there for s, there in zip(config.layers, kept, strict=True)),
    tuple((np.arange(s.ffn) < ffn) & there for s, there in zip(config.layers, kept, strict=True)),
    unit,
  )


class _Bench:
  """The whole model, loaded, beside which narrower ones are timed."""

  def __init__(self, source: Source, options: RunOptions, prompts: list[list[int]]):
    self._options, self._prompts, self.config = options.bench, prompts, source.config
    self._dtype = compute_dtype(options.model.dtype)
    self._params = load_source(source, self._dtype)
    self._whole = self._generator(self.config, self._params)
    self.whole: list[Seconds] = []

  def _generator(self, config: ModelConfig, params: Params) -> Generator:
    b = self._options
    generator = Generator(config, params, compiler=Compiler(), dtype=self._dtype, max_batch=b.batch)
    generator.generate(self._prompts, b.new_tokens)  # compiles
    return generator

  def ratio(self, plan: PrunePlan, title: str) -> Seconds:
    """The time of a part of the model over that of the whole: medians of consecutive runs."""

    def cut(params: Params) -> Params:
      return surgery.compact(params, plan)

    def seconds(timings: Timings) -> Seconds:
      return {'prefill': timings.prefill_seconds, 'decode': timings.decode_seconds / (b.new_tokens - 1)}

    b, params = self._options, mesh.jit(cut, self._params, once=True)(self._params)
    both = self._whole, self._generator(plan.pruned_config(self.config), params)
    timings = time_in_turn(both, self._prompts, b.new_tokens, b.repeats, title)
    whole, part = (list(map(seconds, model)) for model in timings)
    self.whole += whole
    pairs = list(zip(part, whole, strict=True))
    return {kind: statistics.median(p[kind] / w[kind] for p, w in pairs) for kind in _KINDS}


def measure(
  source: Source, options: RunOptions, prompts: list[list[int]], unit: AttentionUnit
) -> dict[str, dict[str, Any]]:
  """The phases of a `latency.Table` as JSON."""
  bench, config = _Bench(source, options, prompts), source.config
  depth = config.num_layers
  whole_units, ffn = unit.count(config.layers[0]), config.layers[0].ffn

  def ratio(title: str, units: int = whole_units, channels: int = ffn, layers: int = depth) -> Seconds:
    return bench.ratio(narrowed(config, units, channels, layers, unit), title)

  fewer_units = () if config.traits.joint_qk_norm else widths_of(whole_units)  # such heads cannot be removed
  by_units = {k: ratio(f'{k} {unit.title}', units=k) for k in fewer_units}
  by_channels = {f: ratio(f'{f:,} channels', channels=f) for f in widths_of(ffn)}
  half = max(depth // 2, 1)
  fewer = ratio(f'{half} layers', layers=half) if half < depth else None

  def phase(kind: str) -> dict[str, Any]:
    whole = statistics.median(seconds[kind] for seconds in bench.whole)
    layer = whole * (1 - fewer[kind]) / (depth - half) if fewer else whole / depth

    def curve(ratios: dict[int, Seconds], full: int) -> dict[str, list[Any]]:
      """Seconds of a block of one layer, such that none of it takes none: by the line of the two lowest."""
      saved = [*(whole * (1 - ratio[kind]) / depth for ratio in ratios.values()), 0.0]
      widths = [*ratios, full]
      slope = (saved[0] - saved[1]) / (widths[1] - widths[0]) if ratios else 0.0
      most = saved[0] + slope * widths[0]
      return {'widths': widths, 'seconds': [most - x for x in saved]}

    attention, mlp = curve(by_units, whole_units), curve(by_channels, ffn)
    rest = layer - attention['seconds'][-1] - mlp['seconds'][-1]
    return {'fixed': whole - depth * layer, 'rest': rest, 'attention': attention, 'mlp': mlp}

  return {kind: phase(kind) for kind in _KINDS}


def run(
  options: RunOptions, source: Source, prompts: list[list[int]], workdir: Workdir, command: str
) -> None:
  """Measures the model, writes report.json and bench.md, and prints the table. Raises InputError."""
  if not source.config.uniform:
    raise InputError(
      f'bench.dense is empty, and {source.name}, whose layers differ in width, does not record its '
      f'origin: name the model before pruning'
    )
  with workdir.claimed():
    unit = find_unit(dataclasses.replace(options.prune, target='1latency'), source.config)
    report: Json = {
      **latency.here(compute_dtype(options.model.dtype)),
      'date': datetime.date.today().isoformat(),
      'source': source.name,
      'repeats': options.bench.repeats,
      'latency': {
        'unit': unit.name,
        'model': latency.likeness(source.config, unit),
        'request': latency.request_of(options.bench),
        **measure(source, options, prompts, unit),
      },
      'command': command,
      'versions': versions(),
    }
    report['warning'] = warning(report)
    finish(report, _table(report, source.config.num_layers), workdir)
    flags = f'--config.prune.target=0.8latency --config.prune.latency_table={workdir.report}'
    print(f'\nto prune for such requests: {flags}')


def finish(report: Json, table: str, workdir: Workdir) -> None:
  """Writes the table and the report, and prints the table."""
  write_text(workdir.path / 'bench.md', table)
  write_report(workdir.report, report)
  print(f'\n{table}', end='')


def _titles(report: Json) -> tuple[tuple[str, str], ...]:
  """The blocks, and what their widths are."""
  return ('attention', UNITS_BY_NAME[report['latency']['unit']].title), ('mlp', 'MLP channels')


def warning(report: Json) -> str:
  """A warning if some narrower block took as long as a wider one, or longer; else ''."""
  for kind in _KINDS:
    for block, name in _titles(report):
      widths, seconds = (report['latency'][kind][block][of] for of in ('widths', 'seconds'))
      if wrong := [i for i in range(1, len(widths)) if seconds[i] <= seconds[i - 1]]:
        return (
          f'warning: in the {kind}, {widths[wrong[0] - 1]:,} {name} took no less time than '
          f'{widths[wrong[0]]:,}: measure again on an idle machine, or with a larger bench.repeats'
        )
  return ''


def _table(report: Json, layers: int) -> str:
  """Milliseconds of all layers' blocks by width, and of what is outside them."""
  phases, request = [report['latency'][kind] for kind in _KINDS], report['latency']['request']
  seconds = {}
  for block, name in _titles(report):
    for i, width in enumerate(phases[0][block]['widths']):
      seconds[f'{width:,} {name}'] = [layers * phase[block]['seconds'][i] for phase in phases]
  seconds['norms and the rest of the layers'] = [layers * phase['rest'] for phase in phases]
  seconds['embedding and head'] = [phase['fixed'] for phase in phases]
  rows = [[title, *(f'{1000 * x:,.4g}' for x in values)] for title, values in seconds.items()]
  warned = f'{report["warning"]}\n' if report['warning'] else ''
  return (
    f'{Table(["all layers, ms", "prefill", "decoding step"], rows).markdown()}\n\n'
    f'{report["source"]} on {report["device"]}, {report["dtype"]}, {report["date"]}; {request["batch"]} x '
    f'{request["prompt_length"]} random ids, {request["new_tokens"]} new tokens each; from medians of '
    f'{report["repeats"]} runs, each beside one of the whole model.\n{warned}'
  )
