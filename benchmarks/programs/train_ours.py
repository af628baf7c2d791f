"""Our training step: DIRECTORY DTYPE[-remat|-mu] STEPS. For benchmarks/training.py."""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.build import from_dict
from adapt_jax.configs import base
from adapt_jax.machine.compiler import Compiler, forget_traces
from adapt_jax.models.formats.source import open_source
from adapt_jax.training.optim import optimizer as make_optimizer
from adapt_jax.training.step import TrainingStep

BATCH, LENGTH = 4, 256


def main(directory: str, form: str, steps: str) -> None:
  config, (dtype, _, variant) = base.get_config(), form.partition('-')
  config.train.update(batch=BATCH, micro_batch=BATCH, length=LENGTH, tokens=10**6, lr=1e-4)
  config.train.update({'remat': {'remat': True}, 'mu': {'mu_dtype': 'bfloat16'}, '': {}}[variant])
  options = from_dict(config.to_dict()).train
  source = open_source(directory)
  optimizer = make_optimizer(options, 1000)
  params = source.load_params('float32')
  state = {'params': params, 'optimizer': optimizer.init(params)}
  tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (BATCH, LENGTH)).astype(np.int32)
  batch = tuple(jnp.asarray(x) for x in (tokens, np.ones_like(tokens, bool), np.ones_like(tokens)))
  start = time.perf_counter()
  step = TrainingStep(source.config, options, optimizer, jnp.dtype(dtype))
  program = Compiler()('training', step, state, batch, donate_argnums=(0,))
  forget_traces()
  result = {'compile_seconds': time.perf_counter() - start, 'tokens_per_second': []}
  del params
  planned = program.memory_analysis()
  result['planned_bytes'] = planned.argument_size_in_bytes + planned.temp_size_in_bytes
  for _ in range(int(steps) + 1):
    start = time.perf_counter()
    state, metrics = program(state, batch)
    result['loss'] = float(jax.block_until_ready((state, metrics))[1]['loss'])
    result['tokens_per_second'].append(tokens.size / (time.perf_counter() - start))
  del result['tokens_per_second'][0]  # the first step touches new memory
  print(json.dumps(result))


if __name__ == '__main__':
  pathlib.Path(sys.argv[1]).resolve(strict=True)
  main(*sys.argv[1:])
