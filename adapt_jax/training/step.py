"""The compiled step of recovery training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adapt_jax.config.options import TrainOptions
from adapt_jax.machine.mesh import rows_at_once
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import on_cpu
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import constrain, constrain_params, row_sharding
from adapt_jax.training.loss import (
  ChunkLoss,
  Head,
  cached_distillation,
  cross_entropy,
  distillation,
  shift,
  spread,
  sum_with_head,
  summed,
  whole,
)

# {'params': fp32 master weights, 'optimizer': optax state}
TrainState = dict[str, Any]
# The arrays of a step's rows; see `batch_shapes`.
Rows = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Teacher:
  """The teacher of distillation: the dense model."""

  config: ModelConfig
  params: Params


def make_step(
  config: ModelConfig,
  options: TrainOptions,
  optimizer: optax.GradientTransformation,
  dtype: Any,
  teacher_config: ModelConfig | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """step(state, rows, teacher_params) -> (state, {'loss', 'gradient_norm'}).

  `rows` are those of `batch_shapes`, with `distill.cache` including the teacher's predictions; otherwise the
  step takes the teacher's parameters, if there is a `teacher_config`. The loss is the mean over the batch's
  targets, in nats, summed over micro-batches of at most `options.micro_batch` rows per device. `dtype` is
  that of activations and matrix products; weights, gradients and the second moment are fp32, the first moment
  is in `options.mu_dtype`.
  """
  alpha, temperature = options.distill.alpha, options.distill.temperature
  micro_batch = rows_at_once(options.batch, options.micro_batch)

  def micro_loss(
    params: Params, own_BDV: jax.Array, head_VD: jax.Array, rows: Rows, scale: jax.Array, teacher: Any
  ) -> jax.Array:
    tokens_BT, targets_BT, segments_BT, *taught = rows
    x_BTD = llama.hidden_states(
      config, params, tokens_BT, segments=segments_BT, dtype=dtype, remat=options.remat
    )
    x_TD = x_BTD.reshape(-1, config.hidden_size)
    labels, weights = shift(tokens_BT, targets_BT)
    loss: ChunkLoss = cross_entropy
    extras: tuple[jax.Array, ...] = (labels, weights * scale)
    if taught:
      loss = cached_distillation(alpha, temperature)
      extras += tuple(x.reshape(len(x_TD), -1) for x in taught)
    elif teacher is not None and teacher_config is not None:
      teacher_params, teacher_head_VD = teacher
      loss = distillation(alpha, temperature, teacher_head_VD)
      y_BTD = llama.hidden_states(
        teacher_config, teacher_params, tokens_BT, segments=segments_BT, dtype=dtype
      )
      extras += (jax.lax.stop_gradient(y_BTD.reshape(x_TD.shape)),)
    return sum_with_head(loss, x_TD, Head(head_VD, own_BDV), extras)

  def gradients(params: Params, rows: Rows, teacher: Params | None) -> tuple[jax.Array, Params]:
    scale = 1 / jnp.maximum(shift(*rows[:2])[1].sum(), 1)
    # For all micro-batches, both heads are gathered once, and the gradient is summed over devices once.
    head = spread(llama.head(params), dtype)
    taught_by = teacher and (teacher, whole(llama.head(teacher), dtype))

    def value_and_grad(micro_rows: Rows) -> tuple[jax.Array, tuple[Params, jax.Array]]:
      of_both = jax.value_and_grad(micro_loss, argnums=(0, 1))
      loss, (gradient, own_BDV) = of_both(params, head.own_BDV, head.whole_VD, micro_rows, scale, taught_by)
      return loss, (constrain_params(gradient), constrain(own_BDV, 'B.V'))

    count = len(rows[0]) // micro_batch
    if count == 1:
      loss, (gradient, own_BDV) = value_and_grad(rows)
    else:

      def accumulate(total: Any, micro_rows: Rows) -> tuple[Any, None]:
        loss, (gradient, own_BDV) = jax.tree.map(jnp.add, total, value_and_grad(micro_rows))
        return (loss, (constrain_params(gradient), constrain(own_BDV, 'B.V'))), None

      micro = tuple(
        constrain(x.reshape(count, micro_batch, *x.shape[1:]), '.B' + '.' * (x.ndim - 1)) for x in rows
      )
      zeros = constrain_params(jax.tree.map(jnp.zeros_like, params))
      start = (jnp.zeros(()), (zeros, head.own_BDV))
      loss, (gradient, own_BDV) = jax.lax.scan(accumulate, start, micro)[0]
    name = 'lm_head' if 'lm_head' in params else 'embed'
    return loss, constrain_params({**gradient, name: gradient[name] + summed(own_BDV)})

  def step(
    state: TrainState, rows: Rows, teacher: Params | None = None
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, gradient = gradients(state['params'], rows, teacher)

    def update(state: TrainState, gradient: Params) -> tuple[TrainState, jax.Array]:
      updates, optimizer_state = optimizer.update(gradient, state['optimizer'], state['params'])
      params = optax.apply_updates(state['params'], updates)
      return {'params': params, 'optimizer': optimizer_state}, optax.tree.norm(gradient)

    def keep(state: TrainState, _: Params) -> tuple[TrainState, jax.Array]:
      return state, jnp.full((), jnp.nan)

    if on_cpu():
      # XLA schedules a branch separately. Scheduled with the backward pass, the updates, which wait for the
      # norm of all gradients, make XLA keep recomputed values: twice the temporary memory.
      state, norm = jax.lax.cond(jnp.isfinite(loss), update, keep, state, gradient)
    else:
      state, norm = update(state, gradient)
    return state, {'loss': loss, 'gradient_norm': norm}

  return step


def batch_shapes(options: TrainOptions) -> Rows:
  """Shapes, dtypes and shardings of a step's rows: tokens, targets and segments [batch, length].

  With distill.cache, also the teacher's ids [batch, length, k] and log p [batch, length, k+1].
  """
  shape, split, k = (options.batch, options.length), row_sharding(), options.distill.kept_ids
  shapes: list[tuple[tuple[int, ...], Any]] = [(shape, jnp.int32), (shape, jnp.bool_), (shape, jnp.int32)]
  if k:
    shapes += [((*shape, k), jnp.int32), ((*shape, k + 1), jnp.float32)]
  return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=split) for shape, dtype in shapes)
