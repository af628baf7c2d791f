"""Mode export: a checkpoint of any supported form, or what a run has reached, in the forms asked for."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import RunOptions
from adapt_jax.data.chat_templates import with_template
from adapt_jax.export.writer import Writer, check_formats, check_tokenizer, lineage, written_dtype
from adapt_jax.machine.mesh import check_model
from adapt_jax.pipeline.checkpoint import Checkpoints
from adapt_jax.pipeline.inputs import load_source
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan, PruneState
from adapt_jax.reports.summary import settings, versions
from adapt_jax.training.optim import optimizer
from models.config import ModelConfig, count_params
from models.errors import InputError
from models.files import exists, write_text
from models.formats.safetensors import read_json
from models.formats.source import Source, open_source
from models.network.llama import Params
from models.network.sharding import placed


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Writes WORKDIR/<format>; with export.dtype = auto every tensor keeps its bits.

  model.source may also be the workdir of a run of mode accel or prune: of one that is not finished its newest
  checkpoint is taken.
  """
  path = pathlib.Path(options.model.source).expanduser()
  unfinished = exists(path / 'run.json') and not exists(path / 'hf') and exists(path / 'checkpoints')
  model = _from_checkpoint(path) if unfinished else _from_source(options)
  tokenizer = with_template(model.source.load_tokenizer(), model.chat_template)
  check_formats(options.export, model.config)
  check_tokenizer(options.export, tokenizer)
  check_model(model.config)
  workdir.claim()
  dtype = written_dtype(options.export, model.source.dtype, model.trained)
  writer = Writer(
    options.export,
    workdir,
    tokenizer=tokenizer,
    dtype=dtype,
    generation=model.source.generation,
    report=model.report,
  )
  exports = writer.write(model.config, model.load(as_is=options.export.formats == ('hf',) and dtype is None))
  report = model.report | {'command': command, 'exports': exports, 'versions': versions()}
  write_text(workdir.report, json.dumps(report, indent=2) + '\n')


@dataclasses.dataclass(frozen=True)
class _Model:
  """What is exported; `source` has its tokenizer, and its dtype where training has made the weights fp32."""

  config: ModelConfig
  source: Source
  trained: bool
  chat_template: str
  report: dict[str, Any]
  checkpoint: tuple[Checkpoints, int, Any] | None = None

  def load(self, as_is: bool) -> Params:
    """The parameters; `as_is`: a checkpoint is to be written as it is, and stays in its files until then."""
    if self.checkpoint is None:
      return self.source.stored_params() if as_is else load_source(self.source, None)
    checkpoints, number, shapes = self.checkpoint
    params: Params = checkpoints.restore(number, shapes)['params']
    checkpoints.close()
    return params


def _from_source(options: RunOptions) -> _Model:
  source = open_source(options.model.source)
  named = {'model': {'source': source.name, 'params_before': count_params(source.config)}}
  return _Model(source.config, source, False, options.data.chat_template, lineage(source) or named)


def _from_checkpoint(path: pathlib.Path) -> _Model:
  """The model at the widths and weights that the run in `path` saved last."""
  saved = read_json(path / 'run.json')
  if saved.get('mode') not in ('accel', 'prune'):
    raise InputError(f'model.source = {str(path)!r} is the workdir of another mode than accel or prune')
  ran = from_dict(saved['config'])
  source = open_source(ran.model.source)
  checkpoints = Checkpoints(path / 'checkpoints', read_only=True)
  if (number := checkpoints.latest()) is None:
    raise InputError(f'model.source = {str(path)!r}: no checkpoint of this run is complete yet: wait for one')
  meta = checkpoints.meta(number)
  trained = ran.train.tokens > 0
  config, dense = source.config, source.abstract_params(jnp.float32 if trained else None)
  if ran.prune.compensate == 'bias':
    config = dataclasses.replace(config, output_bias=True)
    dense = jax.eval_shape(lambda p: surgery.with_output_bias(source.config, p)[1], dense)
  plan = PruneState.from_json(meta['pruning'], config).plan

  def arrays(params: Params) -> dict[str, Any]:
    cut = surgery.compact(params, plan)
    return {'params': cut} | ({'optimizer': optimizer(ran.train, 1).init(cut)} if trained else {})

  pruned = plan.pruned_config(config)
  rows = [*meta['rows'], meta['row'] | plan.widths(config)] if meta['row'] else meta['rows']
  report = {
    'model': {
      'source': source.name,
      'params_before': count_params(source.config),
      'params_after': count_params(pruned),
      **PrunePlan.dense(config).widths(config),
    },
    'perplexity': {'dense': meta['dense_perplexity']},
    'tasks': meta['tasks'],
    'stages': rows,
    **settings(ran),
  }
  shapes = placed(jax.eval_shape(arrays, dense))
  return _Model(pruned, source, trained, ran.data.chat_template, report, (checkpoints, number, shapes))
