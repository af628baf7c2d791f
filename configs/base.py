"""All options with their defaults, from which the other recipes start.

    python main.py --config=configs/base.py --workdir=out/run \
        --config.model.source=HuggingFaceTB/SmolLM2-135M-Instruct \
        --config.prune.calibration.source=calibration.txt \
        --config.train.source=corpus.jsonl --config.train.tokens=10_000_000 \
        --config.evaluate.source=heldout.txt

The meaning and allowed values of each option are declared in `adapt_jax/config/options.py`, of pruning in
`prune_options.py`, and of single modes in `mode_options.py`, in the same folder.
"""

from ml_collections import ConfigDict, FieldReference

from adapt_jax.config import build


def get_config() -> ConfigDict:
  """The defaults: obs with least squares (the paper's: configs/adapt.py); recipes set model and data."""
  config = ConfigDict(build.defaults())
  config.prune.target = FieldReference(config.prune.target, field_type=object)  # a number, a text or several
  return config
