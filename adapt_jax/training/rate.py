"""The learning rate that fits a model's weights, where none is given (`train.lr` = -1).

A step of Adam changes every weight by about the learning rate, whatever the gradient. So the same rate is a
small change in a model with large weights and a large one in a model with small weights: those of
SmolLM2-135M are twelve times as large as those of Qwen2.5-0.5B. The default is a share of their root mean
square. It grows with the square root of the tokens of a step (Malladi et al., arXiv 2205.10287), at
most four times: rates beyond were too high for the steps that were measured.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapt_jax.config.options import TrainOptions
from adapt_jax.models.errors import InputError

# The share, tuned on SmolLM2-135M with steps of so many tokens, and how many times larger it may become.
SHARE, TOKENS, MOST = 5e-4, 2048, 4.0
_MATRICES = {'attention': ('q', 'k', 'v', 'o'), 'mlp': ('gate', 'up', 'down')}


def root_mean_square(params: Mapping[str, Any]) -> float:
  """Of all matrices of the layer in the middle; its arrays are read one by one."""
  layers = params['layers']
  layer, squares, count = layers[len(layers) // 2], 0.0, 0
  for block, names in _MATRICES.items():
    for name in names:
      weight = np.asarray(layer[block][name], np.float32)
      squares, count = squares + float(np.square(weight, dtype=np.float64).sum()), count + weight.size
  return float(np.sqrt(squares / count))


def with_rate(options: TrainOptions, params: Mapping[str, Any]) -> TrainOptions:
  """The options with learning rates instead of -1, to two digits.

  params: those of the dense model. Raises InputError if min_lr is above the rate.
  """
  if options.lr < 0:
    share = SHARE * min((options.batch * options.length / TOKENS) ** 0.5, MOST)
    options = dataclasses.replace(options, lr=float(f'{share * root_mean_square(params):.1e}'))
  if options.min_lr > options.lr:
    raise InputError(
      f'train.min_lr = {options.min_lr} is above the learning rate {options.lr}, which follows from '
      f'the weights: lower it, or set train.lr'
    )
  return dataclasses.replace(options, min_lr=options.end_lr)
