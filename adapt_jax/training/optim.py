"""AdamW without weight decay, and learning-rate schedules that span all stages (paper section 4)."""

import jax.numpy as jnp
import optax

from adapt_jax.config.options import TrainOptions

# Share of the steps in which `wsd` decays.
DECAY = 0.1


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
  """Clips by global norm, then applies Adam (0.9, 0.999) and the schedule; its state has the step count.

  The first moment is kept in `options.mu_dtype`. The second is fp32: a step changes it by a thousandth, which
  bfloat16 would round away.
  """
  return optax.chain(
    optax.clip_by_global_norm(options.clip),
    optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8, mu_dtype=jnp.dtype(options.mu_dtype)),
    optax.scale_by_learning_rate(learning_rate(options, total_steps)),
  )
