"""Recovery training: the step that is compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adapt_jax.config.options import TrainOptions
from adapt_jax.machine.mesh import rows_at_once
from adapt_jax.training.loss import cross_entropy, distillation, shift, sum_over_chunks
from models.config import ModelConfig
from models.network import llama
from models.network.backend import on_cpu
from models.network.llama import Params
from models.network.sharding import constrain, constrain_params, row_sharding

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


def batch_shapes(options: TrainOptions) -> list[jax.ShapeDtypeStruct]:
  """Shapes and places of what a step takes beside the state: tokens, targets and segments [batch, length]."""
  shape, split = (options.batch, options.length), row_sharding()
  dtypes = (jnp.int32, jnp.bool_, jnp.int32)
  return [jax.ShapeDtypeStruct(shape, dtype, sharding=split) for dtype in dtypes]
