"""Mode recover: trains a model of any origin by distillation from another, in a run that prunes nothing."""

import dataclasses

from adapt_jax.config.identity import RECOVERY
from adapt_jax.config.options import RunOptions
from adapt_jax.config.prune_options import PruneOptions
from adapt_jax.models.errors import InputError
from adapt_jax.modes import accel
from adapt_jax.modes.mode import Mode

_NOTHING = PruneOptions(target=1.0, compensate='none', heal=0)


def settled(options: RunOptions) -> RunOptions:
  """The options without pruning, whatever the recipe says. Raises InputError without tokens or a teacher."""
  train = options.train
  if not train.tokens:
    raise InputError('train.tokens = 0, but mode recover trains: set it')
  if not train.distill.source:
    raise InputError('train.distill.source is empty: name the model to distil from, such as the dense one')
  if not train.distill.alpha:
    raise InputError('train.distill.alpha = 0, but mode recover distils: raise it')
  return dataclasses.replace(options, prune=_NOTHING)


MODE = Mode(
  'recover',
  'train model.source, whoever pruned it, by distillation from train.distill.source',
  accel.run,
  result=RECOVERY,
  reads=('mesh', 'tracker'),
  settle=settled,
  several_processes=True,
)
