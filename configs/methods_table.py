"""Compares all pruning methods but SliceGPT on SmolLM2-135M-Instruct: perplexity by target, without recovery.

    python main.py --mode=compare --config=configs/methods_table.py --workdir=out/methods

It calibrates on the training text of WikiText-2 and measures on its validation text. Both are read from
data/wikitext-2/ or from the files given by

    --config.prune.calibration.source=wiki.train.tokens --config.evaluate.source=wiki.valid.tokens

The model is that of configs/demo.py (`make demo`, or the first run, downloads it). A method scores
16 x 256 tokens, drawn three times (median and range), the same for all methods but adapt and uniform, which
draw new ones at every step; compensation uses the rows of the last step, magnitude scores on none. Other
authors' methods are shown as in their papers, and with this project's least squares. It takes several hours
on two cores.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo

_METHODS = ('obs', 'adapt', 'uniform', 'llm_pruner', 'flap', 'wanda_sp', 'shortgpt')


def get_config() -> ConfigDict:
  config = demo.get_config()
  config.prune.stages = 1
  config.prune.calibration.source = ('data/wikitext-2/wiki.train.tokens',)
  config.prune.calibration.samples = 16
  config.prune.calibration.length = 256  # as in the windows of the evaluation
  # For adapt and uniform: half the paper's 50 steps, each twice as large, for the same sparsities.
  config.prune.steps = 25
  config.prune.amplitude = 0.04
  config.prune.align_ffn = 1
  config.evaluate.source = ('data/wikitext-2/wiki.valid.tokens',)
  config.evaluate.max_tokens = 8 * 1024
  config.compare.grid = (
    _rows(_METHODS, 'none'),
    _rows(('flap',), 'bias'),
    _rows((*_METHODS, 'magnitude'), 'least_squares'),
    _rows(('magnitude',), 'none') | {'seed': (0,)},
  )
  return config


def _rows(methods: tuple[str, ...], compensate: str) -> dict[str, tuple]:
  return {
    'prune.method': methods,
    'prune.compensate': (compensate,),
    'prune.target': (0.9, 0.8, 0.6),
    'seed': (0, 1, 2),
  }
