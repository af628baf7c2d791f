"""Checks of a run before any heavy work, cheap ones first: texts, target, steps, exports, mesh."""

import dataclasses
import itertools

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import SELF
from adapt_jax.data.chat_templates import read_template
from adapt_jax.data.documents import check_source
from adapt_jax.export.writer import check_result
from adapt_jax.generation import self_text
from adapt_jax.machine import mesh
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import sharding
from adapt_jax.pipeline.dense_model import with_output_bias
from adapt_jax.pipeline.loader import evaluation_field
from adapt_jax.pipeline.schedule import stage_steps, target_params
from adapt_jax.pruning import serving_widths, slicegpt
from adapt_jax.pruning.methods import METHODS

_MAY_BE_OWN = ('prune.calibration.source', 'train.source')  # text that the model has written
# Fields of prune that a run of SliceGPT cannot have otherwise.
_SLICING = {'compensate': 'none', 'stages': 1, 'align_kv': 1, 'align_ffn': 1, 'serve': 'any'}


def check_sources(options: RunOptions) -> None:
  """Checks that every source of the run can be read; tokenises nothing. Raises InputError."""
  read_template(options.data.chat_template)
  fields = {'prune.calibration.source': options.prune.calibration.source}
  if options.train.tokens:
    fields['train.source'] = options.train.source
  fields |= {evaluation_field(name): source for name, source in options.evaluate.texts.items()}
  for field, source in fields.items():
    if field in _MAY_BE_OWN and SELF in source:
      continue  # the model will tell
    check_source(
      source,
      f'config.{field}',
      text_field=options.data.text_field,
      messages_field=options.data.messages_field,
    )


def check_run(options: RunOptions, config: ModelConfig) -> None:
  """Checks widths for prune.serve, the target, the batches of each stage, the forms. Raises InputError.

  config: of the source.
  """
  for group, of in (('prune.calibration', options.prune.calibration), ('train', options.train)):
    self_text.check(of.source, of.length, config.max_position, group)
  if config.sliced_from:
    raise InputError(
      f'{options.model.source} is sliced by SliceGPT, and no method prunes or trains such a model: name the '
      f'one that it was made from'
    )
  if options.prune.method == slicegpt.METHOD:
    _check_slicing(options, config)
    return
  serving_widths.check_model(options.prune.serve, config)
  _check_target(options, config)
  _check_steps(options)
  _check_teacher(options, config)
  check_result(options.export, with_output_bias(config, options.prune.compensate == 'bias'))
  mesh.check_model(config)
  mesh.check_batches(options)


def _check_target(options: RunOptions, config: ModelConfig) -> None:
  target = target_params(config, options.prune.target)
  pruned = with_output_bias(config, options.prune.compensate == 'bias')
  smallest = METHODS[options.prune.method](pruned, options.prune).smallest()
  if target < smallest:
    raise InputError(
      f'config.prune.target = {options.prune.target:g} asks for {target:,} parameters, but what '
      f'config.prune.method = {options.prune.method!r} always keeps already has {smallest:,}: raise it'
    )


def _check_slicing(options: RunOptions, config: ModelConfig) -> None:
  """What `SliceRun` cannot do is refused by name."""
  method = f'config.prune.method = {slicegpt.METHOD!r}'
  for field, value in _SLICING.items():
    if (given := getattr(options.prune, field)) != value:
      raise InputError(f'config.prune.{field} = {given!r} is not for {method}: set it to {value!r}')
  if options.train.tokens:
    raise InputError(
      f'config.train.tokens = {options.train.tokens:,}, but {method} is a rival without recovery: use '
      f'--mode=prune or, in mode compare, config.compare.recover = False'
    )
  if others := [name for name in options.export.formats if name != 'hf']:
    raise InputError(
      f"config.export.formats has {others[0]!r}, which cannot hold the model of {method}: set it to 'hf'"
    )
  if (found := sharding.mesh()) is not None:
    raise InputError(f'{method} runs on one device, and there are {found.size}: show it only one')
  if not slicegpt.width_for(config, target_params(config, options.prune.target)):
    raise InputError(
      f'config.prune.target = {options.prune.target:g} is below what a residual stream of one number needs: '
      f'raise it'
    )


def _check_teacher(options: RunOptions, config: ModelConfig) -> None:
  kept = options.train.distill.kept_ids
  if options.train.tokens and kept >= config.vocab_size:
    raise InputError(
      f'config.train.distill.cache = {kept} must be below the {config.vocab_size} ids of the model: lower it'
    )


def _check_steps(options: RunOptions) -> None:
  t = options.train
  stages, batch = options.prune.stages, t.batch * t.length

  def enough(steps: int) -> bool:
    ends = [0, *stage_steps(dataclasses.replace(t, tokens=steps * batch), stages)]
    return all(start < stop for start, stop in itertools.pairwise(ends))

  if t.tokens and not enough(t.tokens // batch):
    least = next(steps for steps in itertools.count(stages) if enough(steps)) * batch
    raise InputError(
      f'config.train.tokens = {t.tokens:,} leaves a stage without a batch of {t.batch} x {t.length} tokens; '
      f'it is split over {stages} stages ({t.split}): give at least {least:,}, or lower train.batch or '
      f'prune.stages'
    )
