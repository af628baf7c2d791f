"""Compiles programs of one stage from shapes alone and prints the seconds. For benchmarks/compile_time.py.

python -m benchmarks.programs.compile_stage '{"layers": 30, ...}' training,evaluation
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.build import from_dict
from adapt_jax.config.options import TrainOptions
from adapt_jax.configs import base
from adapt_jax.evaluation.perplexity import _Loss
from adapt_jax.machine import mesh
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import compiler_options, loop_options
from adapt_jax.pruning import surgery
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep


def dense_config(shape: dict[str, Any]) -> ModelConfig:
  """The model before pruning."""
  layers = (LayerShape(shape['heads'], shape['kv'], shape['ffn']),) * shape['layers']
  size = shape['vocab'], shape['hidden'], shape['head_dim']
  return ModelConfig('llama', *size, layers, RopeConfig(1e4), 1e-5, True)


def random_plan(config: ModelConfig, widths: list[list[int]]) -> PrunePlan:
  """A random plan that keeps these numbers of KV groups and channels in each layer."""
  rng = np.random.default_rng(0)

  def mask(size: int, kept: int) -> np.ndarray:
    return np.isin(np.arange(size), rng.permutation(size)[:kept])

  pairs = list(zip(config.layers, widths, strict=True))
  kv = tuple(mask(s.num_kv_heads, k) for s, (k, _) in pairs)
  return PrunePlan(kv, tuple(mask(s.ffn, f) for s, (_, f) in pairs))


def train_options(shape: dict[str, Any]) -> TrainOptions:
  config = base.get_config()
  config.model.source = 'shapes alone'
  config.train.source = config.prune.calibration.source = ('shapes alone',)
  config.train.batch, config.train.micro_batch = shape['rows'], shape['micro']
  config.train.length = shape['length']
  config.train.lr = 1e-4
  config.train.tokens = 100 * shape['rows'] * shape['length']
  return from_dict(config.to_dict()).train


def programs(shape: dict[str, Any]) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
  """The functions of a run by name, each with its arguments and the options of `mesh.jit`.

  training, evaluation, compaction, stacking: in each stage; scoring: once per run.
  """
  options, dense = train_options(shape), dense_config(shape)
  plan, tx = random_plan(dense, shape['widths']), optimizer(options, 100)
  config = plan.pruned_config(dense)

  def state(config: ModelConfig) -> Any:
    params = llama.abstract_params(config)
    return {'params': params, 'optimizer': jax.eval_shape(tx.init, params)}

  before, after, rows = state(dense), state(config), (shape['rows'], shape['length'])
  batch = tuple(jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.int32, jnp.bool_, jnp.int32))
  windows = [jax.ShapeDtypeStruct((4, shape['length']), dtype) for dtype in (jnp.int32, jnp.bool_)]

  def compaction(arrays: Any) -> Any:
    return surgery.compact_optimizer(arrays, arrays['params'], plan)

  def stacking(params: Any) -> Any:
    return surgery.stack(params, plan, jnp.float32)

  stacked, once = jax.eval_shape(stacking, after['params']), {'once': True}
  scorer = Scorer(dense, 'taylor', 'cosine', 8, jnp.float32)
  calibration = jax.ShapeDtypeStruct((64, 64), jnp.int32)
  return {
    'training': (TrainingStep(config, options, tx, jnp.float32), (after, batch), {'donate_argnums': (0,)}),
    'evaluation': (_Loss(config, jnp.float32), (after['params'], *windows), {}),
    'compaction': (compaction, (before,), once),
    'stacking': (stacking, (after['params'],), once),
    'scoring': (scorer, (stacked, calibration), {}),
  }


def measure(shape: dict[str, Any], names: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
  """For each program, seconds of tracing and lowering, of XLA, and CPU seconds of both."""
  jax.jit(lambda x: x + 1)(jnp.zeros(()))  # starts the backend
  found = programs(shape)
  for name in names:
    fn, args, settings = found[name]
    start, cpu = time.perf_counter(), time.process_time()
    lowered = mesh.jit(fn, *args, **settings).trace(*args).lower()
    middle = time.perf_counter()
    lowered.compile(compiler_options() | (loop_options() if name == 'scoring' else {}))
    end = time.perf_counter()
    yield name, {'trace': middle - start, 'xla': end - middle, 'cpu': time.process_time() - cpu}


def main(shape: str, names: str) -> None:
  hits: list[str] = []
  jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.rsplit('/', 1)[-1]))
  found = dict(measure(json.loads(shape), names.split(',')))
  print(json.dumps({'programs': found, 'hits': hits.count('cache_hits')}))


if __name__ == '__main__':
  main(*sys.argv[1:])
