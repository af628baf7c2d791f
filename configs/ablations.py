"""The paper's ablations on SmolLM2-135M-Instruct; each is one grid with a table, plots and a page.

    python main.py --mode=compare --config=configs/ablations.py:amplitude --workdir=out/amplitude

amplitude: how strongly layer importance changes the layers' sparsities, by target; 0 prunes all equally.
distance: the distance between a layer's input and output that defines its importance, by target.
calibration: the calibration text and its number of rows, with three draws each.
interleave: the same model and training in 1 to 8 rounds of prune and recover (Fig. 4: perplexity-kept.svg).

The method is the paper's, adapt; the model is that of configs/demo.py, and the text its addresses (`make
fetch` downloads both). interleave trains on 80 x 1,024 tokens; the others only prune. To
continue a grid that was killed, repeat the command. To use other values:
--config.compare.grid="({'prune.amplitude': (0.0, 0.02)},)".
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo

_GRIDS = {
  'amplitude': {'prune.target': (0.9, 0.8, 0.7), 'prune.amplitude': (0.0, 0.005, 0.01, 0.02, 0.04)},
  'distance': {'prune.layer_distance': ('cosine', 'euclidean', 'manhattan'), 'prune.target': (0.9, 0.8, 0.7)},
  'calibration': {
    # Addresses up to 1899, from 2000 on, and all.
    'prune.calibration.source': ('data/sotu/train/1[78]*.txt', 'data/sotu/train/20*.txt', 'data/sotu/train'),
    'prune.calibration.samples': (16, 64, 256),
    'seed': (0, 1, 2),
  },
  'interleave': {'prune.stages': (1, 2, 4, 8)},
}


def get_config(variant: str = '') -> ConfigDict:
  """The recipe of a variant. Raises ValueError for an unknown one."""
  if variant not in _GRIDS:
    raise ValueError(f'variant {variant!r}: write ablations:NAME, a NAME of {", ".join(_GRIDS)}')
  config = demo.get_config()
  config.prune.method, config.prune.compensate, config.prune.heal = 'adapt', 'none', 0
  config.prune.calibration.length, config.prune.calibration.batch = 64, 8
  config.prune.calibration.own, config.prune.calibration.samples = 0.0, 8
  config.prune.calibration.source = config.train.source = ('data/sotu/train',)
  config.prune.calibration.weights = ()
  config.evaluate.source = ('addresses=data/sotu/valid', 'encyclopedia=data/encyclopedia/valid')
  config.evaluate.length = 256
  config.compare.grid = (_GRIDS[variant],)
  if variant == 'interleave':
    config.prune.target = 0.7
    config.prune.stage_targets = 'geometric'  # the same fraction is kept in every round
    config.compare.recover, config.train.tokens = True, 80 * 1024
    config.train.batch = config.train.micro_batch = 4
    config.train.length = 256
    config.train.lr, config.train.min_lr = 1.5e-4, 1e-5  # higher than the paper's, which is for long runs
    config.train.distill.alpha = 0.0  # cross-entropy, as in the paper
  return config
