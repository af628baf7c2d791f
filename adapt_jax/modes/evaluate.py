"""Mode evaluate: perplexity, task scores and health of one model."""

import math
import time
from typing import Any

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import TEXT
from adapt_jax.data.windows import Blocks
from adapt_jax.evaluation.harness import check_tasks, evaluate_tasks
from adapt_jax.evaluation.health import Health
from adapt_jax.evaluation.perplexity import Evaluator, tokens_per_byte
from adapt_jax.machine.compiler import Compiler, Programs
from adapt_jax.machine.mesh import check_model, load_source
from adapt_jax.machine.processes import say
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.models.network.llama import Params
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.loader import Loader
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports.report import EvaluationReport, TextReport, versions, write_report
from adapt_jax.reports.summary import health_lines, tasks_table


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Writes the perplexity of model.source on evaluate.source, its task scores and health to report.json."""
  wanted = options.evaluate
  check_tasks(wanted)
  source = open_source(options.model.source)
  check_model(source.config)
  loader = Loader(options, source, source.load_tokenizer())
  if not wanted.source and not wanted.has_tasks and not wanted.health:
    raise InputError(
      'evaluate.source is empty, no task is named, and health is off: there is nothing to measure'
    )
  texts = loader.evaluation()
  with workdir.claimed():
    compiler, start = Compiler(), time.monotonic()
    common: dict[str, Any] = {'compiler': compiler, 'dtype': compute_dtype(options.model.dtype)}
    params, size = load_source(source, common['dtype']), count_params(source.config)
    report: EvaluationReport = {'model': {'source': source.name, 'params_before': size}}
    said = [f'{size:,} parameters']
    if texts:
      report['texts'] = _measure(texts, wanted.batch, source, params, loader.tokenizer, common)
      first = next(iter(report['texts'].values()))
      report['perplexity'] = {'dense': first['dense'], 'definition': first['definition']}
      said = [
        f'{said[0]}, perplexity{_on(name)} {of["dense"]:.3f}, {of["bits_per_byte"]:.3f} bits per byte: '
        f'{of["definition"]}'
        for name, of in report['texts'].items()
      ]
    if wanted.has_tasks:
      args = source.config, params, loader.tokenizer, source.generation
      report['tasks'] = evaluate_tasks(wanted, *args, title='tasks', **common)
      said += ['', tasks_table({'score': report['tasks']}).markdown()]
    if wanted.health:
      health = Health(source.config, loader.tokenizer, source.generation, loader.own, **common)
      report['health'] = health.report(health.answers(source.config, params, 'answers'))
      said += health_lines(report['health'])
    report |= {
      'command': command,
      'compiles': compiler.counts,
      'seconds': time.monotonic() - start,
      'versions': versions(*(('lm_eval',) if wanted.has_tasks else ())),
    }
    write_report(workdir.report, report)
    say('\n'.join(said))


def _measure(
  texts: dict[str, Blocks], batch: int, source: Source, params: Params, tokenizer: Any, common: dict[str, Any]
) -> dict[str, TextReport]:
  """Perplexity and bits per byte on each text, by its name."""
  measured: dict[str, TextReport] = {}
  programs = Programs(most=2)  # shared by texts with batches of the same shape
  for name, blocks in texts.items():
    evaluator = Evaluator(blocks, batch, **common, programs=programs)
    value = evaluator.perplexity(source.config, params, f'evaluate{_on(name)}')
    bits = tokens_per_byte(blocks, tokenizer) * math.log2(value)
    measured[name] = {'dense': value, 'bits_per_byte': bits, 'definition': evaluator.definition}
  return measured


def _on(name: str) -> str:
  return '' if name == TEXT else f' on {name}'


MODE = Mode(
  'evaluate',
  'measure perplexity, task scores and answers of model.source',
  run,
  result=('model', 'data', 'evaluate', 'evaluate.health'),
  reads=('mesh',),
  several_processes=True,
)
