"""Prunes SmolLM2-135M-Instruct to 80 % of its parameters in two stages, on a laptop's CPU.

    adapt-jax --config=demo --workdir=out/demo

`make demo` runs this. `make fetch` downloads the model (98 MB) and the texts to data/.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.source = 'data/SmolLM2-135M-Instruct.Q4_1.gguf'
  prose = ('data/sotu/train',)

  config.prune.target = 0.8
  config.prune.stages = 2
  config.prune.align_ffn = 32  # also suits the quantisation blocks of llama.cpp
  config.prune.calibration.source = prose
  config.prune.calibration.samples = 8

  config.train.source = prose
  config.train.tokens = 48 * 1024
  config.train.batch = 4
  config.train.micro_batch = 4
  config.train.length = 256
  config.train.lr = 1.5e-4  # higher than the paper's, which is for long runs
  config.train.min_lr = 1e-5
  config.train.save_every = 20

  # Text of the kind used for calibration and training, and of another kind.
  config.evaluate.source = ('addresses=data/sotu/valid', 'encyclopedia=data/encyclopedia/valid')
  config.evaluate.length = 256
  config.evaluate.max_tokens = 4 * 1024
  return config
