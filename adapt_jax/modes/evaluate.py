"""Mode evaluate: perplexity and task scores of one model."""

import math
import time
from typing import Any

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import TEXT
from adapt_jax.evaluation.harness import check_tasks, evaluate_tasks
from adapt_jax.evaluation.perplexity import Evaluator, tokens_per_byte
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import check_model, load_source
from adapt_jax.machine.processes import say
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.loader import Loader
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports.report import EvaluationReport, TextReport, versions, write_report
from adapt_jax.reports.summary import tasks_table


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Writes the perplexity of model.source on evaluate.source, and its task scores, to report.json."""
  tasks, wanted = options.evaluate.has_tasks, options.evaluate
  check_tasks(wanted)
  source = open_source(options.model.source)
  check_model(source.config)
  loader = Loader(options, source, source.load_tokenizer())
  if not wanted.source and not tasks:
    raise InputError('evaluate.source is empty, and no task is named: there is nothing to measure')
  texts = loader.evaluation()
  with workdir.claimed():
    dtype, compiler, start = compute_dtype(options.model.dtype), Compiler(), time.monotonic()
    common: dict[str, Any] = {'compiler': compiler, 'dtype': dtype}
    params = load_source(source, dtype)
    report: EvaluationReport = {
      'model': {'source': source.name, 'params_before': count_params(source.config)}
    }
    size, said = f'{count_params(source.config):,} parameters', list[str]()
    found: dict[str, TextReport] = {}
    programs: dict[type, tuple[Any, Any]] = {}  # shared by texts with batches of the same shape
    for name, blocks in texts.items():
      evaluator = Evaluator(blocks, wanted.batch, **common, programs=programs)
      named = '' if list(texts) == [TEXT] else f' on {name}'
      value = evaluator.perplexity(source.config, params, f'evaluate{named}')
      bits = tokens_per_byte(blocks, loader.tokenizer) * math.log2(value)
      found[name] = {'dense': value, 'bits_per_byte': bits, 'definition': evaluator.definition}
      said.append(f'{size}, perplexity{named} {value:.3f}, {bits:.3f} bits per byte: {evaluator.definition}')
    if first := next(iter(found.values()), None):
      report['perplexity'] = {'dense': first['dense'], 'definition': first['definition']}
      report['texts'] = found
    if tasks:
      args = source.config, params, loader.tokenizer, source.generation
      scores = evaluate_tasks(wanted, *args, title='tasks', **common)
      report['tasks'] = scores
      said += [*([] if said else [size]), '', tasks_table({'score': scores}).markdown()]
    report |= {
      'command': command,
      'compiles': compiler.counts,
      'seconds': time.monotonic() - start,
      'versions': versions(*(('lm_eval',) if tasks else ())),
    }
    write_report(workdir.report, report)
    say('\n'.join(said))


MODE = Mode(
  'evaluate',
  'measure perplexity and task scores of model.source',
  run,
  result=('model', 'data', 'evaluate'),
  reads=('mesh',),
  several_processes=True,
)
