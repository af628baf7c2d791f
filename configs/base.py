"""All options with their defaults, from which the other recipes start.

    python main.py --config=configs/base.py --workdir=out/run \
        --config.model.source=HuggingFaceTB/SmolLM2-135M-Instruct \
        --config.prune.calibration.source=calibration.txt \
        --config.train.source=corpus.jsonl --config.train.tokens=10_000_000 \
        --config.evaluate.source=heldout.txt

The meaning and allowed values of each option are declared in `adapt_jax/config/options.py`, of pruning in
`prune_options.py`, and of single modes in `mode_options.py`, in the same folder.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

from adapt_jax.config import build


class _Options(ConfigDict):
  """Options or a group of them, in which a string stands for a list of one: config.train.source = 'a.txt'.

  True and False stand for the choices of these names: config.train.remat = True.
  """

  def __setitem__(self, name: str, value: Any) -> None:
    before = self.get(name)
    if isinstance(value, str) and isinstance(before, tuple):
      value = (value,)
    elif isinstance(value, bool) and isinstance(before, str):
      value = str(value)
    super().__setitem__(name, value)


def _options(fields: dict[str, Any]) -> ConfigDict:
  made = _Options()
  for name, value in fields.items():
    made[name] = _options(value) if isinstance(value, dict) else value
  return made.lock()


def get_config() -> ConfigDict:
  """The defaults: obs with least squares (the paper's: configs/adapt.py); recipes set model and data."""
  config = _options(build.defaults())
  config.prune.target = FieldReference(config.prune.target, field_type=object)  # a number, a text or several
  return config
