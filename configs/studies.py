"""Studies of pruning and recovery; each is one grid with a table, plots and a page.

    python main.py --mode=compare --config=configs/studies.py:rates --workdir=out/rates

rates: highest learning rates, 2e-5 to 5e-4, at 80 % kept.
interleave: the same training, in batches of 2 rows, in 1, 2, 4, 8 and 16 rounds of prune and recover, at 80
  and 60 % kept (Fig. 4).
sizes: no recovery; what pruning costs at three sizes, from 24 and from 128 rows of calibration text.
own: no recovery; 8 rows of one kind of text, alone and beside 8 rows that the model generates, for each kind;
  also measured on two kinds that no row came from.
rows: no recovery; 128 rows, with and without healing, also measured on two kinds that no row came from.
share: no recovery; the demo's calibration, with no, a quarter, half and three quarters of its rows generated.
covering: seven kinds of text, with the defaults, and text that the model generates instead; also measured on
  speeches and on code of another package.

All but own, share and covering calibrate and train on equal shares of three kinds of text. All measure
each kind separately on held-out documents; scripts/mixed_texts.py makes the files. All take
the model of configs/demo.py, SmolLM2-135M-Instruct. 100,000 tokens take ten minutes or more.
To continue a grid that was killed, repeat the command.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo

KINDS = {'wiki': 'wiki.txt', 'web': 'web.jsonl', 'chat': 'chat.jsonl'}
_TRAIN = tuple(f'data/mixed/train/{name}' for name in KINDS.values())

_GRIDS: dict[str, tuple[dict[str, tuple], ...]] = {
  'rates': ({'train.lr': (2e-5, 5e-5, 1e-4, 2e-4, 5e-4)},),
  'interleave': ({'prune.stages': (1, 2, 4, 8, 16), 'prune.target': (0.8, 0.6)},),
  'sizes': ({'prune.target': (110_602_944, 98_157_312, 79_757_568), 'prune.calibration.samples': (24, 128)},),
  'own': tuple(
    {
      'prune.calibration.source': ((file,),),
      'prune.calibration.weights': ((),),
      'prune.calibration.samples': (samples,),
      'prune.calibration.own': (own,),
    }
    for file in _TRAIN
    for samples, own in ((8, 0.0), (16, 0.5))
  ),
  'rows': ({'prune.heal': (1, 0), 'prune.target': (110_602_944,), 'prune.calibration.samples': (128,)},),
  'share': ({'prune.calibration.own': (0.25, 0.0, 0.5, 0.75)},),
  'covering': (
    {'train.tokens': (800 * 1024,)},
    {'train.tokens': (200 * 1024,), 'train.lr': (-1.0, 2e-4)},
    {'train.tokens': (200 * 1024,), 'train.source': (('self',),), 'train.weights': ((),)},
  ),
}


def get_config(variant: str = '') -> ConfigDict:
  """The recipe of a variant. Raises ValueError for an unknown one."""
  if variant not in _GRIDS:
    raise ValueError(f'variant {variant!r}: write studies:NAME, a NAME of {", ".join(_GRIDS)}')
  config = demo.get_config()
  config.model.dtype = 'bfloat16'  # as on accelerators; also faster on a CPU with AVX-512 BF16
  alike = (1.0,) * len(KINDS)
  config.prune.align_ffn, config.prune.heal = 1, 0
  calibration = config.prune.calibration
  calibration.source, calibration.weights, calibration.samples = _TRAIN, alike, 24
  calibration.length, calibration.own = 1024, 0.0

  config.train.source, config.train.weights = _TRAIN, alike
  config.train.tokens, config.train.batch, config.train.micro_batch = 100 * 1024, 4, 4
  config.train.length = 512
  if variant == 'interleave':  # so that each of 16 rounds has a batch to train on
    config.train.batch = config.train.micro_batch = 2
  config.train.lr, config.train.min_lr = 1e-4, 1e-5

  config.evaluate.source = tuple(f'{kind}=data/mixed/valid/{name}' for kind, name in KINDS.items())
  config.evaluate.length, config.evaluate.max_tokens = 1024, 8 * 1024
  if variant in ('own', 'rows'):
    config.evaluate.source += ('speeches=data/sotu/valid', 'code=data/code/valid')
  if variant in ('share', 'covering'):
    more = ('fiction', 'code', 'instructions')
    config.prune.heal, calibration.samples = 1, 32
    config.evaluate.source += tuple(f'{kind}=data/mixed/valid/{kind}.jsonl' for kind in more)
    config.evaluate.source += ('speeches=data/sotu/valid', 'package=data/code/valid')
    config.evaluate.length, config.evaluate.max_tokens = 512, 4 * 1024
  if variant == 'share':
    own = demo.get_config()
    config.prune.calibration, config.prune.align_ffn = own.prune.calibration, own.prune.align_ffn
  if variant == 'covering':
    calibration.source = (*_TRAIN, *(f'data/mixed/train/{kind}.jsonl' for kind in (*more, 'edu')))
    calibration.weights = config.train.weights = (1.0,) * 7
    config.train.source = calibration.source
    config.train.lr, config.train.min_lr, calibration.own = -1.0, -1.0, 0.25
  config.compare.grid = _GRIDS[variant]
  config.compare.recover = variant not in ('sizes', 'own', 'rows', 'share')
  return config
