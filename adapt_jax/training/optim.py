"""AdamW without weight decay, and learning-rate schedules that span all stages (paper section 4)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adapt_jax.config.options import TrainOptions
from adapt_jax.models.network.backend import on_cpu

# Share of the steps in which `wsd` decays.
DECAY = 0.1
_B1, _EPS = 0.9, 1e-8


def learning_rate(options: TrainOptions, total_steps: int) -> optax.Schedule:
  """Step (0-based) -> learning rate, over the whole run.

  `wsd`: linear warm-up, constant, linear decay over the last tenth to `min_lr` (Hu et al., arXiv
  2404.06395). `cosine`: the same warm-up, then half a cosine to `min_lr`. Raises ValueError for -1, which
  stands for a rate that follows from the weights (`rate.with_rate`).
  """
  if options.lr < 0:
    raise ValueError(f'lr = {options.lr} is no learning rate yet')
  warmup = int(round(options.warmup * total_steps))
  lr, low = options.lr, options.end_lr
  # Step s uses the value at s+1 while warming up, so that the first step is not wasted at rate 0.
  rising = optax.linear_schedule(lr / max(warmup, 1), lr, max(warmup - 1, 1))
  if options.schedule == 'cosine':
    steps = max(total_steps - warmup - 1, 1)
    falling = optax.cosine_decay_schedule(lr, steps, alpha=low / lr if lr else 0.0)
    return optax.join_schedules([rising, falling], [warmup])
  # Also a short run ends at `min_lr`, if a step is left after the warm-up, or after the first without one.
  decay = min(max(int(round(DECAY * total_steps)), 1), max(total_steps - max(warmup, 1), 0))
  # Shifted by one step, as in the warm-up, so that the last step runs at `min_lr`.
  falling = optax.linear_schedule(lr + (low - lr) / max(decay, 1), low, max(decay - 1, 1))
  return optax.join_schedules(
    [rising, optax.constant_schedule(lr), falling], [warmup, max(total_steps - decay, warmup)]
  )


def optimizer(options: TrainOptions, total_steps: int) -> optax.GradientTransformation:
  """Clips by global norm, then applies Adam and the schedule; its state has the step count.

  Adam's decays are 0.9 and 0.999. With moments in bfloat16, the second is 0.95: rounding to 2⁻⁸ would lose
  changes by a thousandth. On CPUs, updates are then computed from the rounded moments.
  """
  exact = options.moments_dtype == 'float32'
  return optax.chain(
    optax.clip_by_global_norm(options.clip),
    optax.scale_by_adam(_B1, b2=0.999, eps=_EPS) if exact else _adam_in(jnp.dtype(options.moments_dtype)),
    optax.scale_by_learning_rate(learning_rate(options, total_steps)),
  )


def _adam_in(dtype: jnp.dtype, b2: float = 0.95) -> optax.GradientTransformation:
  """Adam that computes in fp32 and keeps both moments in `dtype` between steps."""
  adam = optax.scale_by_adam(_B1, b2, _EPS)

  def cast(state: optax.ScaleByAdamState, to: jnp.dtype) -> optax.ScaleByAdamState:
    return state._replace(mu=optax.tree.cast(state.mu, to), nu=optax.tree.cast(state.nu, to))

  def init(params: Any) -> optax.ScaleByAdamState:
    return cast(adam.init(params), dtype)

  def update(gradient: Any, state: optax.ScaleByAdamState, params: Any = None) -> Any:
    state = cast(adam.update(gradient, cast(state, jnp.dtype(jnp.float32)), params)[1], dtype)
    if on_cpu():
      # Otherwise XLA computes the moments again for the weights, from the old ones, which are then still
      # needed when the new ones are written: both are in memory, for all weights at once.
      state = jax.lax.optimization_barrier(state)
    exact = cast(state, jnp.dtype(jnp.float32))
    mu = optax.tree.bias_correction(exact.mu, _B1, exact.count)
    nu = optax.tree.bias_correction(exact.nu, b2, exact.count)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + _EPS), mu, nu), state

  return optax.GradientTransformation(init, update)
