"""Seconds, CPU seconds and planned bytes of one program at several sizes. For benchmarks/growth.py.

python -m benchmarks.programs.growth_points training '[{"tokens": 1024, "layers": 4, "hidden": 256}]' 3
"""

import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import compiler_options, loop_options
from adapt_jax.pipeline.flops import forward as forward_flops
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep
from benchmarks.programs.compile_stage import train_options

LENGTH, HEAD_DIM, VOCAB, MICRO = 128, 32, 512, 8


def model(layers: int, hidden: int) -> ModelConfig:
  """Grouped-query attention with two heads per group; MLPs of three times the hidden size."""
  heads = hidden // HEAD_DIM
  shape = LayerShape(heads, heads // 2, 3 * hidden)
  return ModelConfig('llama', VOCAB, hidden, HEAD_DIM, (shape,) * layers, RopeConfig(1e4), 1e-5, True)


def scoring(config: ModelConfig, tokens: jax.Array) -> tuple[Any, tuple[Any, ...]]:
  """The compiled program of a pruning step, with micro-batches of 8 rows, and its arguments."""
  plan = PrunePlan.dense(config)

  def stacked() -> Any:
    return surgery.stack(llama.init_params(config, jax.random.key(0)), plan, jnp.float32)

  args = jax.jit(stacked)(), tokens
  scorer = Scorer(config, 'taylor', 'cosine', min(MICRO, len(tokens)), jnp.float32)
  return jax.jit(scorer).lower(*args).compile(compiler_options() | loop_options()), args


def training(config: ModelConfig, tokens: jax.Array) -> tuple[Any, tuple[Any, ...]]:
  """The compiled program of a training step, with all rows in one micro-batch, and its arguments."""
  count, length = tokens.shape
  options = train_options({'rows': count, 'micro': count, 'length': length})
  tx = optimizer(options, 100)

  def state() -> Any:
    params = llama.init_params(config, jax.random.key(0))
    return {'params': params, 'optimizer': tx.init(params)}

  rows = tokens, jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
  args = jax.jit(state)(), rows
  step = TrainingStep(config, options, tx, jnp.float32)
  return jax.jit(step, donate_argnums=(0,)).lower(*args).compile(compiler_options()), args


def point(name: str, size: dict[str, int], repeats: int) -> dict[str, float]:
  """Medians of `repeats` steps after a first one."""
  config = model(size['layers'], size['hidden'])
  rows = max(1, size['tokens'] // LENGTH)
  tokens = jax.random.randint(jax.random.key(1), (rows, size['tokens'] // rows), 0, VOCAB)
  program, args = {'scoring': scoring, 'training': training}[name](config, tokens)
  plan = program.memory_analysis()
  walls, cpus = [], []
  for _ in range(repeats + 1):
    start, cpu = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(program(*args))
    walls.append(time.perf_counter() - start)
    cpus.append(time.process_time() - cpu)
    if name == 'training':
      args = found[0], *args[1:]
    del found
  fresh = plan.output_size_in_bytes - plan.alias_size_in_bytes
  return {
    'seconds': statistics.median(walls[1:]),
    'cpu': statistics.median(cpus[1:]),
    'bytes': plan.argument_size_in_bytes + plan.temp_size_in_bytes + fresh,
    # Forward, backward of twice that; scoring has another forward.
    'flops': {'scoring': 4, 'training': 3}[name] * size['tokens'] * forward_flops(config, tokens.shape[1]),
  }


def main(name: str, sizes: str, repeats: str) -> None:
  print(json.dumps({'points': [point(name, size, int(repeats)) for size in json.loads(sizes)]}))


if __name__ == '__main__':
  main(*sys.argv[1:])
