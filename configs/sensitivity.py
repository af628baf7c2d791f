"""Which layers of SmolLM2-135M-Instruct bear pruning: perplexity when one layer alone loses half.

    python main.py --mode=sensitivity --config=configs/sensitivity.py --workdir=out/sensitivity

Model and text are those of configs/demo.py (`make demo`, or the first run, fetches them). 30 layers
on three bases are 90 evaluations: so few tokens each (4,096) that all take twenty minutes or so on two
cores; the curves are as rough as that. Raise evaluate.max_tokens for finer ones.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo


def get_config() -> ConfigDict:
  config = demo.get_config()
  config.prune.method = 'adapt'  # Taylor scores say what goes of a layer, as in the paper
  config.prune.align_ffn = 1  # exactly the sparsities asked for
  config.evaluate.source = ('data/sotu/valid',)
  config.evaluate.max_tokens = 4 * 1024
  return config
