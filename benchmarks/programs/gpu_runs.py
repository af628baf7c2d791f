"""Rows of benchmarks/gpu.py that use the library as a user does: the default pipeline, and a checkpoint."""

import pathlib
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.configs import base
from adapt_jax.pipeline.checkpoint import Checkpoints
from adapt_jax.training.optim import optimizer
from benchmarks.demo_models import GGUF
from benchmarks.gpu import Row
from benchmarks.programs.gpu_models import model, seconds_of, stats, tokens, weights
from benchmarks.side_by_side import ROOT


def pipeline(row: Row, toy: bool) -> dict[str, Any]:
  """Prunes SmolLM2-135M-Instruct to 80 % by the defaults, and measures it on texts held out.

  Without healing, which follows the rounding of a device; with the defaults' dtype, also with it.
  """
  if toy:
    net = aj.Model(model(row.model), weights(model(row.model), jnp.float32))
    rows = held_out = tokens(row, net.config)
  elif GGUF.exists():
    net = aj.load(str(GGUF))
    rows, held_out = (
      aj.rows(net, str(ROOT / f'data/sotu/{part}'), samples=row.rows, length=row.length, own=0.0)
      for part in ('train', 'valid')
    )
  else:
    return {'said': f'{GGUF.relative_to(ROOT)} is not here: make fetch'}
  if row.form == 'in float32':  # as on a CPU; not in TF32
    with (
      mock.patch('adapt_jax.api.compute_dtype', lambda name: jnp.dtype(jnp.float32)),
      jax.default_matmul_precision('highest'),
    ):
      return _pruned(net, rows, held_out)
  found = _pruned(net, rows, held_out)
  if not row.form:
    start = time.perf_counter()
    healed, _ = aj.prune(net, rows)
    jax.block_until_ready(healed.params)
    found['healing seconds'] = time.perf_counter() - start
    found['healed'] = aj.perplexity(healed, held_out)
  return found


def _pruned(net: aj.Model, rows: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
  """Perplexity of the model and of the pruned, the groups that went, as bits, and seconds with compiling."""
  start = time.perf_counter()
  small, plan = aj.prune(net, rows, heal=0)
  jax.block_until_ready(small.params)
  seconds = time.perf_counter() - start
  removed = ~np.concatenate([*plan.kv, *plan.ffn])
  return {
    'seconds': [seconds],
    'dense': aj.perplexity(net, held_out),
    'pruned': aj.perplexity(small, held_out),
    'removed': np.packbits(removed).tobytes().hex(),
    'peak': stats('peak_bytes_in_use'),
  }


def checkpoint(row: Row, toy: bool) -> dict[str, Any]:
  """Times saving and restoring the state of training: weights and moments in float32."""
  params = weights(model(row.model), jnp.float32)
  values = base.get_config()
  values.train.lr = 1e-4
  tx = optimizer(from_dict(values.to_dict()).train, 1000)
  state = {'params': params, 'optimizer': jax.jit(tx.init)(params)}
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  (ROOT / 'out').mkdir(exist_ok=True)  # where runs write
  with tempfile.TemporaryDirectory(dir=ROOT / 'out') as directory:
    checkpoints = Checkpoints(pathlib.Path(directory))
    blocked = seconds_of(lambda: checkpoints.save(state, {}), 0.0, least=1)
    written = [blocked[0] + more for more in seconds_of(checkpoints.wait, 0.0, least=1)]
    restored = seconds_of(lambda: jax.block_until_ready(checkpoints.restore(1, target)), 0.0, least=1)
  return {
    'blocked': blocked,
    'save': written,
    'restore': restored,
    'bytes': sum(x.nbytes for x in jax.tree.leaves(state)),
  }
