"""Recovery training: the jitted step and its loop."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adapt_jax.config.options import TrainOptions
from adapt_jax.data.train_set import TrainSet
from adapt_jax.machine import preemption
from adapt_jax.machine.mesh import put_rows, rows_at_once
from adapt_jax.machine.progress import Progress
from adapt_jax.training.loss import cross_entropy, distillation, shift, sum_over_chunks
from adapt_jax.training.optim import learning_rate
from models.config import ModelConfig
from models.errors import InputError
from models.network import llama
from models.network.backend import on_cpu
from models.network.llama import Params
from models.network.sharding import constrain, constrain_params

# {'params': fp32 master weights, 'optimizer': optax state}
TrainState = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Teacher:
  """The dense model that is distilled from."""

  config: ModelConfig
  params: Params


def make_step(
  config: ModelConfig,
  options: TrainOptions,
  optimizer: optax.GradientTransformation,
  dtype: Any,
  teacher_config: ModelConfig | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """step(state, tokens, targets, segments [B, T], teacher_params) -> (state, {'loss', 'gradient_norm'}).

  The loss is a mean over the batch's targets, in nats, summed over micro-batches of at most
  `options.micro_batch` rows a device. `dtype` is that of activations and products; weights, gradients
  and the second moment are fp32, the first is in `options.mu_dtype`.
  """
  alpha, temperature = options.distill.alpha, options.distill.temperature
  micro_batch = rows_at_once(options.batch, options.micro_batch)

  def micro_loss(
    params: Params,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    segments_BT: jax.Array,
    scale: jax.Array,
    teacher: Params | None,
  ) -> jax.Array:
    x_BTD = llama.hidden_states(
      config, params, tokens_BT, segments=segments_BT, dtype=dtype, remat=options.remat
    )
    x_TD = x_BTD.reshape(-1, config.hidden_size)
    labels, weights = shift(tokens_BT, targets_BT)
    if teacher is None or teacher_config is None:
      return sum_over_chunks(cross_entropy, x_TD, llama.head(params), (labels, weights * scale))
    teacher_BTD = llama.hidden_states(teacher_config, teacher, tokens_BT, segments=segments_BT, dtype=dtype)
    teacher_TD = teacher_BTD.reshape(x_TD.shape)
    chunk_loss = distillation(alpha, temperature, llama.head(teacher))
    extras = (labels, weights * scale, jax.lax.stop_gradient(teacher_TD))
    return sum_over_chunks(chunk_loss, x_TD, llama.head(params), extras)

  def gradients(
    params: Params,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    segments_BT: jax.Array,
    teacher: Params | None,
  ) -> tuple[jax.Array, Params]:
    scale = 1 / jnp.maximum(shift(tokens_BT, targets_BT)[1].sum(), 1)
    value_and_grad = jax.value_and_grad(micro_loss)
    count = tokens_BT.shape[0] // micro_batch
    if count == 1:
      loss, gradient = value_and_grad(params, tokens_BT, targets_BT, segments_BT, scale, teacher)
      return loss, constrain_params(gradient)

    def accumulate(total: Any, batch: Any) -> tuple[Any, None]:
      loss, gradient = value_and_grad(params, *batch, scale, teacher)
      return (total[0] + loss, constrain_params(jax.tree.map(jnp.add, total[1], gradient))), None

    micro = [
      constrain(x.reshape(count, micro_batch, -1), '.B.') for x in (tokens_BT, targets_BT, segments_BT)
    ]
    zeros = (jnp.zeros(()), constrain_params(jax.tree.map(jnp.zeros_like, params)))
    return jax.lax.scan(accumulate, zeros, tuple(micro))[0]

  def step(
    state: TrainState,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    segments_BT: jax.Array,
    teacher: Params | None = None,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, gradient = gradients(state['params'], tokens_BT, targets_BT, segments_BT, teacher)

    def update(state: TrainState, gradient: Params) -> tuple[TrainState, jax.Array]:
      updates, optimizer_state = optimizer.update(gradient, state['optimizer'], state['params'])
      params = optax.apply_updates(state['params'], updates)
      return {'params': params, 'optimizer': optimizer_state}, optax.tree.norm(gradient)

    def keep(state: TrainState, _: Params) -> tuple[TrainState, jax.Array]:
      return state, jnp.full((), jnp.nan)

    if on_cpu():
      # A branch is scheduled by itself. In one with the backward pass, updates, which wait for the norm of
      # all gradients, make XLA keep what it has recomputed: twice the temporary memory.
      state, norm = jax.lax.cond(jnp.isfinite(loss), update, keep, state, gradient)
    else:
      state, norm = update(state, gradient)
    return state, {'loss': loss, 'gradient_norm': norm}

  return step


def stage_steps(options: TrainOptions, stages: int) -> list[int]:
  """Global step at which each stage ends; the last is the number of all steps.

  Shares of paper section 4 for stage i of N: linear 2i/(N(N+1)), constant 1/N, cosine
  cos((i−1)π/2N) − cos(iπ/2N).
  """
  total = options.tokens // (options.batch * options.length)
  done = {
    'linear': lambda i: i * (i + 1) / (stages * (stages + 1)),
    'constant': lambda i: i / stages,
    'cosine': lambda i: 1 - math.cos(i * math.pi / (2 * stages)),
  }[options.split]
  return [round(total * done(i)) for i in range(1, stages)] + [total]


def run_steps(
  state: TrainState,
  program: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  data: TrainSet,
  options: TrainOptions,
  *,
  start: int,
  stop: int,
  total: int,
  teacher: Teacher | None,
  on_metrics: Callable[[int, dict[str, float]], None],
  on_save: Callable[[int, TrainState], None],
  title: str,
) -> TrainState:
  """Global steps start … stop-1; returns the state after them.

  Metrics are read one step late, so the device does not wait for the host; a step is saved only
  after its loss was found finite. Raises InputError, naming the step, where it is not, and after SIGTERM
  `Preempted`, once the step is saved.
  """
  rate_at = learning_rate(options, total)
  tokens_per_step = options.batch * options.length
  pending: tuple[int, dict[str, jax.Array]] | None = None
  since = time.monotonic()  # when the step before `pending` was seen to end

  def batch_arrays(step: int) -> tuple[jax.Array, ...]:
    return put_rows(data.rows(step), data.read)

  def report(progress: Progress) -> None:
    nonlocal since
    if pending is None:
      return
    step, device_metrics = pending
    metrics = {k: float(v) for k, v in device_metrics.items()}
    if not math.isfinite(metrics['loss']) or not math.isfinite(metrics['gradient_norm']):
      raise InputError(
        f'training step {step + 1}: loss {metrics["loss"]}, gradient norm {metrics["gradient_norm"]}; '
        f'the last checkpoint is good: lower config.train.lr = {options.lr} and start a new workdir'
      )
    seconds, since = time.monotonic() - since, time.monotonic()
    metrics |= {
      'learning_rate': float(rate_at(step)),
      'tokens_per_second': tokens_per_step / max(seconds, 1e-9),
    }
    on_metrics(step, metrics)
    progress.update(tokens_per_step, loss=f'{metrics["loss"]:.3f}')

  with Progress(title, (stop - start) * tokens_per_step, 'tokens') as progress:
    for step in range(start, stop):
      teachers = (teacher.params,) if teacher else ()
      state, metrics = program(state, *batch_arrays(step), *teachers)
      report(progress)
      pending = step, metrics
      stopping = preemption.requested()
      if stopping or ((step + 1) % options.save_every == 0 and step + 1 < stop):
        report(progress)
        pending = None
        on_save(step + 1, state)
        since = time.monotonic()
      if stopping:
        raise preemption.Preempted
    report(progress)
  return state
