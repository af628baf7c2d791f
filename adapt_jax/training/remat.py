"""Where `train.remat` or `train.micro_batch` is left open: what fits the device by the compiler's plan."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from adapt_jax.config.options import TrainOptions
from adapt_jax.machine.mesh import bytes_of, rows_at_once
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.sharding import device_count, placed, row_shards
from adapt_jax.training.loss import chunk_elements

P = TypeVar('P')

# Of a device's memory that a step may take: a program takes its temporary memory in one piece, which the rest
# must leave free, and no plan counts what cuDNN and NCCL take.
_SHARE = 0.9
# Tokens of a device at once (docs/cluster.md): below the first, passes over weights and gradients cost more
# than remat saves; beyond the second, they are one or two hundredths of a step.
_WORTH_REMAT, _ENOUGH = 4096, 32_768


def chosen(
  options: TrainOptions,
  compile: Callable[[TrainOptions], P],
  fit: Callable[[P], bool],
  likely: Callable[[TrainOptions], bool] | None,
) -> tuple[TrainOptions, P]:
  """The fastest form of the step that fits, compiled, and its options, with nothing left open.

  `remat` and `micro_batch` stay as asked. Otherwise the most rows at once without remat, then with it. If no
  form fits, the smallest is returned.

  Args:
    compile: may raise RESOURCE_EXHAUSTED, as the compiler of TPUs does.
    fit: whether a compiled program fits.
    likely: whether a form should fit, from shapes alone; larger ones are not compiled. None if the memory of
      the devices is not known: then `micro_batch` is 8 and `remat` False.
  """
  *forms, last = _forms(options, likely)
  for form in forms:
    try:
      program = compile(form)
      if fit(program):
        return form, program
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
  return last, compile(last)


def _forms(options: TrainOptions, likely: Callable[[TrainOptions], bool] | None) -> list[TrainOptions]:
  """The forms of a step to try, the fastest first."""
  again = ('False', 'True') if options.remat == 'auto' else (options.remat,)
  if likely is None:
    return [dataclasses.replace(options, remat=again[0], micro_batch=options.at_once)]
  rows, forms = options.batch // row_shards(), list[TrainOptions]()
  for remat in again:
    least = _WORTH_REMAT if remat != again[-1] else 0
    sizes = [options.micro_batch]
    if not options.micro_batch:
      halves = (rows >> k for k in range(rows.bit_length()))
      sizes = [*dict.fromkeys(rows_at_once(rows * row_shards(), n) // row_shards() for n in halves)]
      sizes = [n for n in sizes if n * options.length <= _ENOUGH] or sizes[-1:]
      sizes = [n for n in sizes if n * options.length >= least] or sizes[:1]
    found = [dataclasses.replace(options, remat=remat, micro_batch=n) for n in sizes]
    forms += [form for form in found[:-1] if likely(form)] + found[-1:]
  return forms


def expected(config: ModelConfig, options: TrainOptions, dtype: Any, held: int) -> float:
  """Bytes of a step on a device, from shapes alone: 0.7 to 1 times what the H100's compiler plans.

  Gradients, the head's (`training.loss`), its logits twice, and what the layers keep for the backward pass.
  held: bytes of the step's arguments, and of what else is on the device.
  """
  size, tensor, tokens = jnp.dtype(dtype).itemsize, device_count() // row_shards(), options.length
  tokens *= options.micro_batch
  D, H, head = config.hidden_size, config.head_dim, config.vocab_size * config.hidden_size // tensor
  gradients = bytes_of(placed(llama.abstract_params(config, jnp.float32)))
  logits = 4 * min(tokens * config.vocab_size, chunk_elements())
  kept = 0
  for x in config.layers:
    products = (x.num_heads + 2 * x.num_kv_heads) * H + 2 * x.ffn
    kept += D if options.remat == 'True' else 3 * D + products // tensor
  return held + gradients + (4 + 2 * size) * head + 2 * logits + size * tokens * kept


def fits(size: float, memory: float) -> bool:
  """Whether so many bytes fit a device with so much memory; 0: its memory is not known, as of a CPU's."""
  return not memory or size <= _SHARE * memory


def memory() -> int:
  """Bytes that JAX may use of a device; 0 if that is not known, as on CPUs."""
  return _stats().get('bytes_limit', 0)


def _stats() -> dict[str, int]:
  return jax.local_devices()[0].memory_stats() or {}


def others(*held: Any) -> int:
  """Bytes in use on a device beside these trees of arrays."""
  return max(_stats().get('bytes_in_use', 0) - bytes_of(held), 0)


def planned(program: Any) -> int:
  """Bytes of a compiled program on a device, its arguments included."""
  plan = program.memory_analysis()
  results = plan.output_size_in_bytes - plan.alias_size_in_bytes
  return int(plan.argument_size_in_bytes + plan.temp_size_in_bytes + results)
