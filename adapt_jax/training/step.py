"""The compiled step of recovery training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adapt_jax.config.options import TrainOptions
from adapt_jax.machine.mesh import jit, rows_at_once
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network import llama
from adapt_jax.models.network.backend import on_cpu
from adapt_jax.models.network.llama import Params
from adapt_jax.models.network.sharding import constrain, constrain_params, row_sharding, row_shards
from adapt_jax.training.loss import (
  ChunkLoss,
  cached_distillation,
  capped,
  cross_entropy,
  distillation,
  own_gradients,
  shift,
  sum_and_gradients,
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


class TrainingStep:
  """step(state, rows, teacher_params) -> (state, {'loss', 'gradient_norm'}).

  `rows` are those of `batch_shapes`, with `distill.cache` including the teacher's predictions; otherwise the
  step takes the teacher's parameters, if there is a `teacher_config`. The loss is the mean over the batch's
  targets, in nats, summed over micro-batches of at most `options.at_once` rows per device. `dtype` is
  that of activations and matrix products; weights and gradients are fp32, Adam's moments are in
  `options.moments_dtype`. `options.remat` counts as False if it is auto (`training.remat`).

  It is no dataclass, since two steps never compare equal: a grid would keep the program of every cell
  (`machine.compiler.Compiler`).
  """

  __name__ = 'step'  # of the compiled program

  def __init__(
    self,
    config: ModelConfig,
    options: TrainOptions,
    optimizer: optax.GradientTransformation,
    dtype: Any,
    teacher_config: ModelConfig | None = None,
  ):
    self.config, self.options, self.optimizer = config, options, optimizer
    self.dtype, self.teacher_config = dtype, teacher_config

  def __call__(
    self, state: TrainState, rows: Rows, teacher: Params | None = None
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    loss, gradient = self._gradients(state['params'], rows, teacher)

    def update(state: TrainState, gradient: Params) -> tuple[TrainState, jax.Array]:
      updates, optimizer_state = self.optimizer.update(gradient, state['optimizer'], state['params'])
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

  def _gradients(self, params: Params, rows: Rows, teacher: Params | None) -> tuple[jax.Array, Params]:
    """The loss of a batch and its gradient, summed over micro-batches."""
    scale = 1 / jnp.maximum(shift(*rows[:2])[1].sum(), 1)
    # For all micro-batches, both heads are gathered once, and the gradient is summed over devices once.
    head_VD = llama.head(params)
    whole_VD, own_BDV = whole(head_VD, self.dtype), own_gradients(head_VD, row_shards())
    taught_by = None if teacher is None else (teacher, whole(llama.head(teacher), self.dtype))

    def add(total: Any, micro_rows: Rows) -> tuple[Any, None]:
      loss, gradient, own_BDV = total
      tokens_BT, _, segments_BT, *_ = micro_rows

      def hidden(params: Params) -> jax.Array:
        x_BTD = llama.hidden_states(
          self.config,
          params,
          tokens_BT,
          segments=in_rows(self.options, segments_BT),
          dtype=self.dtype,
          remat=self.options.remat == 'True',
        )
        return x_BTD.reshape(-1, self.config.hidden_size)

      x_TD, back = jax.vjp(hidden, params)
      of_chunk, extras = self._losses(x_TD, micro_rows, scale, taught_by)
      value, dx_TD, own_BDV = sum_and_gradients(of_chunk, x_TD, whole_VD, own_BDV, extras)
      new = back(dx_TD)[0]
      gradient = new if gradient is None else jax.tree.map(jnp.add, gradient, new)
      return (loss + value, constrain_params(gradient), own_BDV), None

    micro_batch = rows_at_once(self.options.batch, self.options.at_once)
    count = len(rows[0]) // micro_batch
    if count == 1:
      loss, gradient, own_BDV = add((jnp.zeros(()), None, own_BDV), rows)[0]
    else:
      micro = tuple(
        constrain(x.reshape(count, micro_batch, *x.shape[1:]), '.B' + '.' * (x.ndim - 1)) for x in rows
      )
      zeros = constrain_params(jax.tree.map(jnp.zeros_like, params))
      loss, gradient, own_BDV = jax.lax.scan(add, (jnp.zeros(()), zeros, own_BDV), micro)[0]
    name = llama.head_name(params)
    return loss, constrain_params({**gradient, name: gradient[name] + summed(own_BDV)})

  def _losses(
    self, x_TD: jax.Array, rows: Rows, scale: jax.Array, teacher: tuple[Params, jax.Array] | None
  ) -> tuple[ChunkLoss, tuple[jax.Array, ...]]:
    """The loss of a micro-batch with final hidden states x, and its other arguments.

    teacher: its parameters, and its whole head.
    """
    alpha, cap = self.options.distill.alpha, self.config.logit_cap
    tokens_BT, targets_BT, segments_BT, *taught = rows
    labels, weights = shift(tokens_BT, targets_BT)
    extras: tuple[jax.Array, ...] = (labels, weights * scale)
    if taught:
      extras += tuple(x.reshape(len(x_TD), -1) for x in taught)
      return capped(cached_distillation(alpha), cap), extras
    if teacher is None or self.teacher_config is None:
      return capped(cross_entropy, cap), extras
    params, head_VD = teacher
    y_BTD = llama.hidden_states(
      self.teacher_config, params, tokens_BT, segments=in_rows(self.options, segments_BT), dtype=self.dtype
    )
    of_chunk = distillation(alpha, head_VD, self.teacher_config.logit_cap)
    return capped(of_chunk, cap), (*extras, y_BTD.reshape(len(x_TD), -1))


def in_rows(options: TrainOptions, segments_BT: jax.Array) -> jax.Array | None:
  """The segments that attention has to tell apart; None if a row is one document, with padding after it.

  Attention is causal, so a document does not see the padding. Without segments, GPUs have a kernel for more
  models (`models.network.flash`).
  """
  return None if options.layout == 'padded' else segments_BT


def begin(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first step: a copy of the parameters in fp32, and the optimizer's state."""

  def start(params: Params) -> TrainState:
    copied = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    return {'params': copied, 'optimizer': optimizer.init(copied)}

  state: TrainState = jit(start, params, once=True)(params)
  return state


def batch_shapes(options: TrainOptions) -> Rows:
  """Shapes, dtypes and shardings of a step's rows: tokens, targets and segments [batch, length].

  With distill.cache, also the teacher's ids [batch, length, k] and log p [batch, length, k+1].
  """
  shape, split, k = (options.batch, options.length), row_sharding(), options.distill.kept_ids
  shapes: list[tuple[tuple[int, ...], Any]] = [(shape, jnp.int32), (shape, jnp.bool_), (shape, jnp.int32)]
  if k:
    shapes += [((*shape, k), jnp.int32), ((*shape, k + 1), jnp.float32)]
  return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=split) for shape, dtype in shapes)
