"""Runs rows of benchmarks/gpu.py one after another in this process; prints a line of JSON for each.

python -m benchmarks.programs.gpu_rows --rows=0,1 --until=UNIX_SECONDS [--toy]
"""

import argparse
import collections
import gc
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.config.build import from_dict
from adapt_jax.configs import base
from adapt_jax.generation.generator import Generator, Timings, bucket
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.hf_config import config_to_hf
from adapt_jax.models.network import attention as attention_forms
from adapt_jax.models.network import flash
from adapt_jax.pipeline.flops import forward as forward_flops
from adapt_jax.pruning import programs, surgery
from adapt_jax.pruning.attention_units import KV_GROUPS
from adapt_jax.pruning.plan import PrunePlan
from adapt_jax.pruning.scorer import Scorer
from adapt_jax.training.optim import optimizer
from adapt_jax.training.step import TrainingStep
from benchmarks.gpu import ROWS, TOY, Row
from benchmarks.programs.gpu_models import BF16, model, plan, seconds_of, segments, stats, tokens, weights
from benchmarks.programs.gpu_runs import checkpoint, pipeline


def card(row: Row, toy: bool) -> dict[str, Any]:
  """The card and its two limits: the speed of a large product, and of reading and writing memory."""
  if jax.default_backend() != 'gpu' and not toy:
    raise SystemExit(
      "JAX sees no GPU here: pip install 'jax[cuda12]' (or cuda13, by the driver), or add --toy"
    )
  size, length = (256, 2**16) if toy else (8192, 2**30)
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
  x = jnp.ones(length, jnp.bfloat16)
  product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda x: x + 1)

  def rate(fn: Callable[[Any], Any], x: Any, work: float) -> float:
    def ten() -> None:
      for _ in range(10):
        out = fn(x)
      jax.block_until_ready(out)

    ten()
    return 10 * work / statistics.median(seconds_of(ten, 0.0 if toy else 1.0))

  return {
    'device': jax.devices()[0].device_kind,
    'platform': ' '.join(jax.devices()[0].client.platform_version.split()),
    'product': rate(product, a, 2.0 * size**3) / 1e12,
    'bandwidth': rate(copy, x, 4.0 * length) / 1e9,
  }


def attention(row: Row, toy: bool) -> dict[str, Any]:
  """Times forward and backward; also the errors of the first row's output and gradients against fp32."""
  (N, K, H), (B, T) = row.heads, (row.rows, row.length)
  keys = jax.random.split(jax.random.key(0), 4)
  q, k, v, g = (
    jax.random.normal(key, (B, T, n, H), jnp.bfloat16) for key, n in zip(keys, (N, K, K, N), strict=True)
  )
  ids = jnp.asarray(segments(row)) if row.segmented else None
  taken = flash.takes(q, row.segmented)

  def ours(*args: Any) -> Any:
    return attention_forms.causal_attention(*args, window=row.window or None)

  def plain(*args: Any) -> Any:
    with mock.patch.object(flash, 'takes', return_value=False):
      return ours(*args)

  def library(q: Any, k: Any, v: Any, ids: Any) -> Any:
    mask = None if ids is None else (ids[:, :, None] == ids[:, None])[:, None]
    window = (row.window - 1, 0) if row.window else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, local_window_size=window)

  def both(form: Callable[..., Any], q: Any, k: Any, v: Any, g: Any, ids: Any) -> Any:
    out, pull = jax.vjp(lambda *x: form(*x, ids), q, k, v)
    return out, *pull(g)

  first = [x[:1].astype(jnp.float32) for x in (q, k, v, g)]
  with jax.default_matmul_precision('highest'):
    exact = jax.jit(lambda *x: both(plain, *x))(*first, None if ids is None else ids[:1])
  found: dict[str, Any] = {'form': 'cuDNN' if taken else "jax.nn's XLA form"}
  for name, form in (('plain', plain), ('other', ours if taken else library)):
    program = jax.jit(lambda *x, form=form: both(form, *x)).lower(q, k, v, g, ids).compile()
    out = program(q, k, v, g, ids)
    found[f'{name} errors'] = [
      float(jnp.abs(a[:1].astype(jnp.float32) - b).max() / jnp.abs(b).max())
      for a, b in zip(out, exact, strict=True)
    ]
    del out
    run = lambda program=program: jax.block_until_ready(program(q, k, v, g, ids))  # noqa: E731
    found[name] = seconds_of(run, 0.0 if toy else 0.5)
    found[f'{name} bytes'] = program.memory_analysis().temp_size_in_bytes
  return found | {'flops': 3 * 2 * B * T * T * N * H}


def training(row: Row, toy: bool) -> dict[str, Any]:
  """Trains at the row's micro-batch; if memory is short, with remat, then with a quarter of the rows."""
  most, before = row.micro or row.rows, []
  for micro, remat in dict.fromkeys([(most, row.remat), (most, True), (max(most // 4, 1), True)]):
    try:
      return _training(row, micro, remat, toy) | {'micro': micro, 'remat': remat, 'before': before}
    except Exception as error:
      if not out_of_memory(error):
        raise
    before.append(f'{micro} rows at once{" with remat" * remat}')
    gc.collect()
    jax.clear_caches()
  raise MemoryError(', '.join(before))


def out_of_memory(error: Exception) -> bool:
  """Whether it is our, XLA's or PyTorch's out-of-memory error."""
  text = str(error).lower()
  return isinstance(error, MemoryError) or 'resource_exhausted' in text or 'out of memory' in text


def _training(row: Row, micro: int, remat: bool, toy: bool) -> dict[str, Any]:
  config, values = model(row.model), base.get_config()
  values.train.update({'batch': row.rows, 'micro_batch': micro, 'length': row.length, 'remat': str(remat)})
  values.train.lr, values.train.distill.alpha = 1e-4, float(row.teacher)
  options = from_dict(values.to_dict()).train
  teachers = (weights(config, BF16),) if row.teacher else ()
  tx = optimizer(options, 1000)
  params = weights(config, jnp.float32)
  state = {'params': params, 'optimizer': jax.jit(tx.init)(params)}
  del params
  counted = np.ones((row.rows, row.length), bool)
  batch = tuple(jnp.asarray(x) for x in (tokens(row, config), counted, segments(row)))
  start = time.perf_counter()
  step = TrainingStep(config, options, tx, BF16, config if row.teacher else None)
  program = Compiler()('training', step, state, batch, *teachers, donate_argnums=(0,))
  compiled = time.perf_counter() - start
  planned = plan(program)
  if planned['planned'] > stats('bytes_limit') > 0:
    raise MemoryError

  def run() -> None:
    nonlocal state
    state, metrics = program(state, batch, *teachers)
    losses.append(float(metrics['loss']))

  losses: list[float] = []
  run()
  run()
  found = seconds_of(run, 0.0 if toy else 6.0)
  return {
    'seconds': found,
    'tokens': row.rows * row.length,
    'flops': (4 if row.teacher else 3) * forward_flops(config, row.length),
    'compile': compiled,
    'peak': stats('peak_bytes_in_use'),
    'losses': [losses[0], losses[-1]],
    **planned,
    **({'kernels': slowest(run)} if row.teacher else {}),
  }


def slowest(run: Callable[[], None], most: int = 10) -> list[tuple[str, float]]:
  """Names and milliseconds of the kernels that take longest in one call, repetitions together."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  totals: collections.Counter[str] = collections.Counter()
  try:
    with tempfile.TemporaryDirectory() as directory:
      with jax.profiler.trace(directory, profiler_options=options):
        run()
      [file] = pathlib.Path(directory).rglob('*.xplane.pb')
      planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
      devices = [plane for plane in planes if plane.name.startswith('/device:GPU')]
      for line in (line for plane in devices or planes for line in plane.lines):
        # Other lines of a GPU repeat what its streams execute, by module and operation.
        if not devices or line.name.startswith('Stream'):
          for event in line.events:
            totals[event.name] += event.duration_ns / 1e6
  except Exception as error:  # the row's other figures stay
    return [(f'no trace: {type(error).__name__}: {error}'[:200], 0.0)]
  return totals.most_common(most)


def pruning(row: Row, toy: bool) -> dict[str, Any]:
  """Times a scoring pass by curvature, or the least squares, of the default method."""
  config, values = model(row.model), base.get_config()
  values.prune.calibration.update({'samples': row.rows, 'length': row.length, 'batch': row.micro})
  options, dense = from_dict(values.to_dict()).prune, PrunePlan.dense(config)
  stacked = jax.jit(lambda params: surgery.stack(params, dense, BF16))(weights(config, BF16))
  make = programs.scoring if row.kind == 'curvature' else programs.compensation
  masks = () if row.kind == 'curvature' else (surgery.padded_masks(dense),)
  args = stacked, *masks, jnp.asarray(tokens(row, config))
  start = time.perf_counter()
  program = Compiler()(row.kind, make(config, options, BF16, KV_GROUPS), *args)
  compiled = time.perf_counter() - start
  run = lambda: jax.block_until_ready(program(*args))  # noqa: E731
  run()
  found = seconds_of(run, 0.0 if toy else 3.0)
  return {'seconds': found, 'compile': compiled, 'peak': stats('peak_bytes_in_use'), **plan(program)}


def scoring(row: Row, toy: bool) -> dict[str, Any]:
  config = model(row.model)
  dense = PrunePlan.dense(config)
  stacked = jax.jit(lambda params: surgery.stack(params, dense, BF16))(weights(config, BF16))
  ids = jnp.asarray(tokens(row, config))
  start = time.perf_counter()
  program = Compiler()('scoring', Scorer(config, micro_batch=row.micro or row.rows, dtype=BF16), stacked, ids)
  compiled = time.perf_counter() - start
  run = lambda: jax.device_get(program(stacked, ids))  # noqa: E731
  run()
  return {
    'seconds': seconds_of(run, 0.0 if toy else 3.0),
    'tokens': ids.size,
    'flops': 3 * forward_flops(config, row.length),
    'compile': compiled,
    'peak': stats('peak_bytes_in_use'),
  }


def peer_scores(net: Any, ids: Any, micro: int) -> list[Any]:
  """[kv [L, K], ffn [L, F], distance [L]] of a transformers model, on the host; its gradients are freed."""
  import torch

  distance = torch.zeros(len(net.model.layers), device=ids.device)

  def hook(i: int) -> Callable[..., None]:
    def measure(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
      x = args[0] if args else kwargs['hidden_states']
      y = output[0] if isinstance(output, tuple) else output
      distance[i] -= torch.nn.functional.cosine_similarity(x.detach().float(), y.detach().float(), -1).sum()

    return measure

  hooks = [x.register_forward_hook(hook(i), with_kwargs=True) for i, x in enumerate(net.model.layers)]
  for part in ids.split(micro):
    (net(input_ids=part, labels=part, use_cache=False).loss * len(part) / len(ids)).backward()
  for handle in hooks:
    handle.remove()
  kv, ffn, K = [], [], net.config.num_key_value_heads
  for layer in net.model.layers:
    a, m = layer.self_attn, layer.mlp
    q, k, v, o, gate, up, down = (
      (x.weight.float() * x.weight.grad.float()).abs()
      for x in (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
    )
    kv.append(sum(x.reshape(K, -1).sum(1) for x in (q, k, v)) + o.sum(0).reshape(K, -1).sum(1))
    ffn.append(gate.sum(1) + up.sum(1) + down.sum(0))
  net.zero_grad(set_to_none=True)
  return [x.detach().cpu() for x in (torch.stack(kv), torch.stack(ffn), distance / ids.numel())]


def peer(row: Row, toy: bool) -> dict[str, Any]:
  try:
    import torch
    import transformers
  except ImportError:
    return {'said': 'no PyTorch here'}
  if not (toy or torch.cuda.is_available()):
    return {'said': 'no PyTorch with CUDA here'}

  config, device = model(row.model), 'cpu' if toy else 'cuda'
  with torch.device(device):
    raw = transformers.LlamaConfig(**config_to_hf(config))
    net = transformers.AutoModelForCausalLM.from_config(raw, dtype=torch.bfloat16).eval()
  ids = torch.as_tensor(tokens(row, config), device=device).long()
  run = lambda: peer_scores(net, ids, row.micro or row.rows)  # noqa: E731
  run()
  found = seconds_of(run, 0.0 if toy else 3.0)
  peak = 0 if toy else torch.cuda.max_memory_allocated()
  return {'seconds': found, 'tokens': ids.numel(), 'peak': peak, 'torch': torch.__version__}


def generation(row: Row, toy: bool) -> dict[str, Any]:
  config = model(row.model)
  generator = Generator(config, weights(config, BF16), compiler=Compiler(), dtype=BF16, max_batch=row.rows)
  prompts = tokens(row, config).tolist()
  generator.generate(prompts, row.new)
  compiled, prefill, decode = generator.timings.compile_seconds, [], []

  def run() -> None:
    generator.timings = Timings()
    generator.generate(prompts, row.new)
    prefill.append(generator.timings.prefill_rate)
    decode.append(generator.timings.decode_rate)

  seconds_of(run, 0.0 if toy else 5.0)
  slots = bucket(row.length) + bucket(row.new)
  cache = sum(4 * row.rows * slots * s.num_kv_heads * config.head_dim for s in config.layers)
  return {
    'prefill': prefill,
    'decode': decode,
    'flops': forward_flops(config, row.length),
    'bytes': 2 * count_params(config) + cache,  # read for one token of every row
    'compile': compiled,
    'peak': stats('peak_bytes_in_use'),
  }


KINDS: dict[str, Callable[[Row, bool], dict[str, Any]]] = {
  'card': card,
  'pipeline': pipeline,
  'attention': attention,
  'training': training,
  'curvature': pruning,
  'least squares': pruning,
  'scoring': scoring,
  'scoring by PyTorch': peer,
  'generation': generation,
  'checkpoint': checkpoint,
}


def measure(row: Row, toy: bool, until: float) -> dict[str, Any]:
  """The row's figures, or {'said': why there are none}."""
  left = until - time.time()
  if left < row.seconds:
    return {'said': f'left out: {left:.0f} s were left'}
  try:
    return KINDS[row.kind](row, toy)
  except Exception as error:
    if out_of_memory(error):
      return {'said': 'out of memory' + f' ({error})' * isinstance(error, MemoryError)}
    last = str(error).strip().splitlines()[:1]
    return {'said': f'failed: {type(error).__name__}: {"".join(last)[:200]}'}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', required=True)
  parser.add_argument('--until', type=float, required=True)
  parser.add_argument('--toy', action='store_true')
  args = parser.parse_args()
  rows = TOY if args.toy else ROWS
  for index in map(int, args.rows.split(',')):
    found = measure(rows[index], args.toy, args.until)
    print(json.dumps({'row': index} | found), flush=True)
    gc.collect()


if __name__ == '__main__':
  main()
