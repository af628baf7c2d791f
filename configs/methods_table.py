"""Compares all pruning methods but SliceGPT on SmolLM2-135M-Instruct, without training.

    python main.py --mode=compare --config=configs/methods_table.py --workdir=out/methods
    python main.py --mode=compare --config=configs/methods_table.py:1 --workdir=out/methods    # one draw

It calibrates on Wikipedia only, and measures there and on two unseen domains, speeches and code. `make fetch`
downloads the model of configs/demo.py and the texts. A method scores 16 x 256 tokens, drawn three times
(median and range; :1 once), the same for all methods. Adapt and uniform draw new ones at every step;
compensation uses the rows of the last step, magnitude scores on none. Other authors' methods are shown as in
their papers, and with this project's least squares. One draw takes an hour on two cores.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo

_METHODS = ('obs', 'adapt', 'uniform', 'llm_pruner', 'flap', 'wanda_sp', 'shortgpt')


def get_config(draws: str = '3') -> ConfigDict:
  """The recipe with so many draws of calibration rows. Raises ValueError if it is no number above 0."""
  if not draws.isdecimal() or not (seeds := tuple(range(int(draws)))):
    raise ValueError(f'variant {draws!r}: write methods_table:N, a number of draws above 0')
  config = demo.get_config()
  config.prune.heal = 0
  calibration = config.prune.calibration
  calibration.source, calibration.weights = ('data/encyclopedia/train',), ()
  calibration.samples, calibration.own = 16, 0.0
  calibration.length = 256  # as in the windows of the evaluation
  # For adapt and uniform: half the paper's 50 steps, each twice as large, for the same sparsities.
  config.prune.steps = 25
  config.prune.amplitude = 0.04
  config.prune.align_ffn = 1
  config.evaluate.max_tokens = 4 * 1024
  config.compare.grid = (
    _rows(_METHODS, 'none', seeds),
    _rows(('flap',), 'bias', seeds),
    _rows((*_METHODS, 'magnitude'), 'least_squares', seeds),
    _rows(('magnitude',), 'none', (0,)),
  )
  return config


def _rows(methods: tuple[str, ...], compensate: str, seeds: tuple[int, ...]) -> dict[str, tuple]:
  return {
    'prune.method': methods,
    'prune.compensate': (compensate,),
    'prune.target': (0.8, 0.6),
    'seed': seeds,
  }
