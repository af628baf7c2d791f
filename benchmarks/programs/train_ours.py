"""Our training step: DIRECTORY DTYPE[-VARIANT...] STEPS [TEACHER]. For benchmarks/training.py.

Variants: remat, moments, kept (memory), micro2 (and so on). With a TEACHER, rows have 512 tokens and the loss
is the divergence from it; cache: from its 64 likeliest ids.
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.build import from_dict
from adapt_jax.configs import base
from adapt_jax.machine import memory
from adapt_jax.machine.compiler import Compiler, forget_traces
from adapt_jax.models.formats.source import open_source
from adapt_jax.training.optim import optimizer as make_optimizer
from adapt_jax.training.step import TrainingStep
from adapt_jax.training.teacher_cache import likeliest

BATCH = 4


def main(directory: str, form: str, steps: str, teacher: str = '') -> None:
  config, (dtype, *variants) = base.get_config(), form.split('-')
  length, sizes = 512 if teacher else 256, [int(v[5:]) for v in variants if v.startswith('micro')]
  config.train.update(batch=BATCH, micro_batch=(*sizes, BATCH)[0], length=length, tokens=10**6, lr=1e-4)
  config.train.update(
    remat=str('remat' in variants), moments_dtype='bfloat16' if 'moments' in variants else 'float32'
  )
  config.train.distill.cache = 64 if 'cache' in variants else 0
  if 'kept' in variants:
    memory.keep()
  options = from_dict(config.to_dict()).train
  source = open_source(directory)
  optimizer = make_optimizer(options, 1000)
  params = source.load_params('float32')
  state = {'params': params, 'optimizer': optimizer.init(params)}
  tokens = np.random.default_rng(0).integers(0, source.config.vocab_size, (BATCH, length)).astype(np.int32)
  batch = tuple(jnp.asarray(x) for x in (tokens, np.ones_like(tokens, bool), np.ones_like(tokens)))
  taught: tuple[Any, ...] = ()
  if teacher:
    dense = open_source(teacher)
    taught = (dense.load_params(dtype),)
    if options.distill.cache:
      batch += jax.jit(likeliest(dense.config, options, dtype))(*taught, batch[0], batch[2])
      taught = ()
  start = time.perf_counter()
  step = TrainingStep(source.config, options, optimizer, jnp.dtype(dtype), dense.config if taught else None)
  program = Compiler()('training', step, state, batch, *taught, donate_argnums=(0,))
  forget_traces()
  result = {'compile_seconds': time.perf_counter() - start, 'tokens_per_second': [], 'cpu_seconds': []}
  del params
  planned = program.memory_analysis()
  result['planned_bytes'] = planned.argument_size_in_bytes + planned.temp_size_in_bytes
  for _ in range(int(steps) + 1):
    start, cpu = time.perf_counter(), time.process_time()
    state, metrics = program(state, batch, *taught)
    result['loss'] = float(jax.block_until_ready((state, metrics))[1]['loss'])
    result['tokens_per_second'].append(tokens.size / (time.perf_counter() - start))
    result['cpu_seconds'].append(time.process_time() - cpu)
  del result['tokens_per_second'][0], result['cpu_seconds'][0]  # the first step touches new memory
  print(json.dumps(result))


if __name__ == '__main__':
  pathlib.Path(sys.argv[1]).resolve(strict=True)
  main(*sys.argv[1:])
