"""Perplexity of SmolLM2-135M-Instruct when a single layer is pruned by half, for every layer.

    python main.py --mode=sensitivity --config=configs/sensitivity.py --workdir=out/sensitivity

The model is that of configs/demo.py, and the text its addresses (`make fetch` downloads both). 30 layers on
three bases are 90 evaluations. Each uses only 4,096 tokens, so that all take about twenty minutes on two
cores, but the curves are noisy. Raise evaluate.max_tokens for more accurate curves.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo


def get_config() -> ConfigDict:
  config = demo.get_config()
  config.prune.method = 'adapt'  # Taylor scores choose the groups to prune, as in the paper
  config.prune.align_ffn = 1  # exactly the requested sparsities
  calibration = config.prune.calibration
  calibration.source, calibration.weights = ('data/sotu/train',), ()
  calibration.samples, calibration.own = 8, 0.0
  config.evaluate.source, config.evaluate.length = ('data/sotu/valid',), 256
  config.evaluate.max_tokens = 4 * 1024
  return config
