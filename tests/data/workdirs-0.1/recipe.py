"""The run of these workdirs: two stages of a tiny model, 12 training steps."""

from ml_collections import ConfigDict

from adapt_jax.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.source = 'model'
  config.prune.method = 'adapt'
  config.prune.target = 0.8
  config.prune.stages = 2
  config.prune.steps = 50
  config.prune.calibration.source = ('train.txt',)
  config.prune.calibration.samples = 8
  config.prune.calibration.length = 16
  config.data.cache = 'cache'
  config.train.source = ('train.txt',)
  config.train.tokens = 12 * 4 * 32
  config.train.batch = 4
  config.train.micro_batch = 4
  config.train.length = 32
  config.train.lr = 1e-2
  config.train.min_lr = 1e-3
  config.train.save_every = 3
  config.train.distill.alpha = 0.0  # the defaults of then
  config.train.distill.temperature = 2.0
  config.evaluate.source = ('valid.txt',)
  config.evaluate.length = 32
  return config
