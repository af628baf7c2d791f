"""Every option with its default; recipes start from `get_config()` and set what differs.

    python main.py --config=configs/base.py --workdir=out/run \
        --config.model.source=HuggingFaceTB/SmolLM2-135M \
        --config.prune.calibration.source=calibration.txt \
        --config.train.source=corpus.jsonl --config.train.tokens=10_000_000 \
        --config.evaluate.source=heldout.txt

What each option means, and what it may be, is declared in `adapt_jax/config/options.py` and, for options of a
single mode, in `adapt_jax/config/mode_options.py`.
"""

from ml_collections import ConfigDict

from adapt_jax.config import build


def get_config() -> ConfigDict:
  """The defaults: obs with least squares (the paper's: configs/adapt.py); model and data the recipe names."""
  return ConfigDict(build.defaults())
