"""Mode export: writes any supported checkpoint, or the state of a run, in the requested formats."""

import dataclasses
import pathlib
from typing import Any

from adapt_jax.config.build import from_dict
from adapt_jax.config.identity import RUNS, WRITTEN
from adapt_jax.config.options import RunOptions
from adapt_jax.data.chat_templates import with_template
from adapt_jax.export.push import check_hub, push
from adapt_jax.export.writer import Writer, check_formats, check_tokenizer, lineage, origin, written_dtype
from adapt_jax.machine.mesh import check_model, load_source
from adapt_jax.machine.processes import decide
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.files import exists, local, read_json
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.llama import Params
from adapt_jax.modes import recover
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.checkpoint import Checkpoints
from adapt_jax.pipeline.dense_model import DenseModel, with_learning_rate
from adapt_jax.pipeline.run_report import described_source, run_report
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pipeline.stages import trained
from adapt_jax.pipeline.state import array_shapes, from_meta
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports.report import RunReport, versions, write_report
from adapt_jax.training.optim import optimizer


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Writes WORKDIR/<format>; with export.dtype = auto every tensor keeps its bits, unless it is quantised.

  model.source may also be the workdir of a run; if it is unfinished, its newest checkpoint is used.
  """
  path = local(options.model.source)
  unfinished = exists(path / 'run.json') and not exists(path / 'hf') and exists(path / 'checkpoints')
  model = _from_checkpoint(path) if unfinished else _from_source(options)
  tokenizer = with_template(model.source.load_tokenizer(), model.chat_template)
  check_formats(options.export, model.config)
  check_tokenizer(options.export, tokenizer)
  check_model(model.config)
  check_hub(options.export)
  with workdir.claimed():
    dtype = written_dtype(options.export, model.source, model.trained)
    as_is = options.export.formats == ('hf',) and dtype is None
    params = model.load(as_is)
    beside = {'tokenizer': tokenizer, 'dtype': dtype, 'generation': model.source.generation}
    write(options, workdir, command, model.config, params, report=model.report, **beside)


def write(
  options: RunOptions,
  workdir: Workdir,
  command: str,
  config: ModelConfig,
  params: Params,
  *,
  report: RunReport,
  **beside: Any,
) -> None:
  """Writes the model in all formats, and report.json; uploads them if `export.push` is set.

  report, beside: as for `Writer`.
  """
  exports = Writer(options.export, workdir.path, report=report, **beside).write(config, params)
  made: RunReport = {**report, 'command': command, 'exports': exports, 'versions': versions()}
  write_report(workdir.report, made)
  decide(lambda: push(options.export, workdir.path))


@dataclasses.dataclass(frozen=True)
class _Model:
  """The model to export; `source` has its tokenizer, and its dtype if training has made the weights fp32."""

  config: ModelConfig
  source: Source
  trained: bool
  chat_template: str
  report: RunReport
  checkpoint: tuple[Checkpoints, int, Any] | None = None

  def load(self, as_is: bool) -> Params:
    """The parameters; with `as_is`, a checkpoint is written unchanged, and its tensors are read only then."""
    if self.checkpoint is None:
      return self.source.stored_params() if as_is else load_source(self.source, None)
    checkpoints, number, shapes = self.checkpoint
    params: Params = checkpoints.restore(number, shapes)['params']
    checkpoints.close()
    return params


def _from_source(options: RunOptions) -> _Model:
  source = open_source(options.model.source)
  report = lineage(source) or origin(source).report()
  return _Model(source.config, source, False, options.data.chat_template, report)


def _from_checkpoint(path: pathlib.Path) -> _Model:
  """The model with the widths and weights that the run in `path` saved last."""
  saved = read_json(path / 'run.json')
  checkpoints = Checkpoints(path / 'checkpoints', read_only=True)
  number = checkpoints.latest()
  if saved.get('mode') not in RUNS or number is None:
    raise InputError(
      f'model.source = {str(path)!r} has no complete checkpoint of a run of mode {" or ".join(RUNS)}: wait'
    )
  ran = from_dict(saved['config'])
  ran = recover.settled(ran) if saved['mode'] == recover.MODE.name else ran
  ran = with_learning_rate(ran, source := open_source(ran.model.source))
  model = DenseModel(source, ran.prune.compensate == 'bias')
  state = from_meta(checkpoints.meta(number), model.config)
  tx = optimizer(ran.train, 1) if ran.train.tokens else None
  shapes = array_shapes(model, state.compacted, tx, trained(ran))
  config = state.compacted.pruned_config(model.config)
  budget = budget_of(ran, source.config, source.dtype)
  report, template = run_report(ran, model, budget, state), ran.data.chat_template
  if not ran.prune.prunes:
    report['teacher'] = described_source(open_source(ran.train.distill.source))
  steps = state.train_step - Schedule.of(ran, budget).start(state.stage)
  if state.row is not None and steps > 0:  # the weights have been trained since they were measured
    report['stages'][-1]['tokens'] = steps * ran.train.batch * ran.train.length
    report['perplexity']['pruned'] = None
    for text in report['texts'].values():
      text.pop('pruned', None)
    report['tasks'] = {of: scores for of, scores in state.tasks.items() if of != 'pruned'}
  return _Model(config, model.source, trained(ran), template, report, (checkpoints, number, shapes))


MODE = Mode(
  'export',
  'write model.source in the formats of export.formats',
  run,
  result=('model.source', 'data.chat_template', *WRITTEN),
  reads=('export.push', 'mesh'),
)
