"""Adapt-Pruner with the settings of its paper: Taylor scores, 512 x 64 calibration tokens, cross-entropy.

    python main.py --config=configs/adapt.py --workdir=out/adapt --config.model.source=...

plus the other fields that configs/base.py needs.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.prune.method = 'adapt'
  config.prune.compensate = 'none'
  config.prune.heal, config.prune.align_ffn = 0, 1
  config.prune.calibration.own = 0.0
  config.prune.calibration.samples = 512
  config.prune.calibration.length = 64
  config.prune.calibration.batch = 8
  config.train.distill.alpha = 0.0  # recovers by cross-entropy
  config.train.lr, config.train.min_lr = 2e-5, 2e-6
  return config
