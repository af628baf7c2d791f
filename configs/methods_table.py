"""All pruning methods side by side on SmolLM2-135M-Instruct: perplexity by target, pruned without recovery.

    python main.py --mode=compare --config=configs/methods_table.py --workdir=out/methods

Calibrates on the training text of WikiText-2 and measures on its validation text, which lie in
data/wikitext-2/ or are named:

    --config.prune.calibration.source=wiki.train.tokens --config.evaluate.source=wiki.valid.tokens

The model is that of configs/demo.py (`make demo`, or scripts/fetch_demo.py, fetches it). What depends on
the calibration rows is drawn three times (median and range); magnitude does not. Rivals are as their papers
have them, without compensation; obs is with its own.
"""

from ml_collections import ConfigDict

from configs import demo

_TARGETS, _SEEDS = (0.9, 0.8, 0.6), (0, 1, 2)


def get_config() -> ConfigDict:
  config = demo.get_config()
  config.prune.stages = 1
  config.prune.calibration.source = ('data/wikitext-2/wiki.train.tokens',)
  config.prune.calibration.samples = 32
  config.prune.calibration.length = 256  # as the windows of the evaluation
  config.prune.calibration.batch = 8
  config.prune.compensate = 'none'
  config.evaluate.source = ('data/wikitext-2/wiki.valid.tokens',)
  config.compare.grid = (
    {
      'prune.method': ('obs',),
      'prune.compensate': ('least_squares',),
      'prune.target': _TARGETS,
      'seed': _SEEDS,
    },
    {
      'prune.method': ('adapt', 'uniform', 'llm_pruner', 'flap', 'wanda_sp', 'shortgpt'),
      'prune.target': _TARGETS,
      'seed': _SEEDS,
    },
    {'prune.method': ('magnitude',), 'prune.target': _TARGETS},
  )
  return config
