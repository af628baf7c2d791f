"""Perplexity of SmolLM2-135M-Instruct when a single layer is pruned by half, for every layer.

    python main.py --mode=sensitivity --config=configs/sensitivity.py --workdir=out/sensitivity

Model and text are the demo's, configs/demo.py (`make fetch` downloads them). 30 layers on
three bases are 90 evaluations. Each uses only 4,096 tokens, so that all take about twenty minutes on two
cores, but the curves are noisy. Raise evaluate.max_tokens for more accurate curves.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo


def get_config() -> ConfigDict:
  config = demo.get_config()
  config.prune.method = 'adapt'  # Taylor scores choose the groups to prune, as in the paper
  config.prune.align_ffn = 1  # exactly the requested sparsities
  config.evaluate.source = ('data/sotu/valid',)
  config.evaluate.max_tokens = 4 * 1024
  return config
