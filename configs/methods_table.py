"""All pruning methods side by side on SmolLM2-135M-Instruct: perplexity by target, pruned without recovery.

    python main.py --mode=compare --config=configs/methods_table.py --workdir=out/methods

Calibrates on the training text of WikiText-2 and measures on its validation text, which lie in
data/wikitext-2/ or are named:

    --config.prune.calibration.source=wiki.train.tokens --config.evaluate.source=wiki.valid.tokens

The model is that of configs/demo.py (`make demo`, or scripts/fetch_demo.py, fetches it). What depends on
the calibration rows is drawn three times (median and range); magnitude does not.
"""

from ml_collections import ConfigDict

from configs import demo

_TARGETS = (0.9, 0.8, 0.6)


def get_config() -> ConfigDict:
  config = demo.get_config()
  config.prune.stages = 1
  config.prune.calibration.source = ('data/wikitext-2/wiki.train.tokens',)
  config.prune.calibration.samples = 128
  config.evaluate.source = ('data/wikitext-2/wiki.valid.tokens',)
  config.compare.grid = (
    {
      'prune.method': ('adapt', 'uniform', 'llm_pruner', 'flap', 'wanda_sp', 'shortgpt'),
      'prune.target': _TARGETS,
      'seed': (0, 1, 2),
    },
    {'prune.method': ('magnitude',), 'prune.target': _TARGETS},
  )
  return config
