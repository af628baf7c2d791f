"""Cross-entropy and distillation over large vocabularies, in chunks of tokens.

A chunk's logits live only inside one scan step. Under differentiation the same step also yields the
chunk's gradients, so the logits are computed once, not again in the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Logits held at once: 2**25 fp32 values are 128 MiB.
_CHUNK_ELEMENTS = 2**25

ChunkLoss = Callable[[jax.Array, jax.Array, Any], jax.Array]


def _split(tree: Any, tokens: int, vocab: int) -> Any:
  """Leading axes of `tokens` to [chunks, tokens of a chunk], padded with zeros: their weight is zero too."""
  chunks = -(-tokens * vocab // _CHUNK_ELEMENTS)
  size = -(-tokens // min(chunks, tokens))

  def split(x: jax.Array) -> jax.Array:
    missing = -tokens % size
    padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
    return padded.reshape(-1, size, *x.shape[1:])

  return jax.tree.map(split, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_chunks(loss: ChunkLoss, x_TD: jax.Array, head_VD: jax.Array, extras: Any) -> jax.Array:
  """Σ of loss(x, head, extras) over chunks of tokens, a scalar in fp32.

  `extras` is a pytree of arrays whose leading axis is tokens, weights among them: a loss must be zero
  for tokens of weight zero, which fill the last chunk. No gradient flows into it.
  """

  def step(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
    return total + loss(xs[0], head_VD, xs[1]), None

  return jax.lax.scan(step, jnp.zeros(()), _split((x_TD, extras), x_TD.shape[0], head_VD.shape[0]))[0]


def _forward(loss: ChunkLoss, x_TD: jax.Array, head_VD: jax.Array, extras: Any) -> Any:
  def step(carry: Any, xs: Any) -> tuple[Any, jax.Array]:
    total, head_gradient = carry
    value, (dx, dhead) = jax.value_and_grad(loss, argnums=(0, 1))(xs[0], head_VD, xs[1])
    return (total + value, head_gradient + dhead), dx

  start = (jnp.zeros(()), jnp.zeros_like(head_VD))
  (total, head_gradient), dx = jax.lax.scan(
    step, start, _split((x_TD, extras), x_TD.shape[0], head_VD.shape[0])
  )
  return total, (dx.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]], head_gradient)


def _backward(loss: ChunkLoss, residuals: Any, g: jax.Array) -> Any:
  dx, dhead = residuals
  return g.astype(dx.dtype) * dx, g.astype(dhead.dtype) * dhead, None


sum_over_chunks.defvjp(_forward, _backward)


def _logits(x_TD: jax.Array, head_VD: jax.Array) -> jax.Array:
  return jnp.einsum('td,vd->tv', x_TD, head_VD.astype(x_TD.dtype), preferred_element_type=jnp.float32)


def _cross_entropy(logits_TV: jax.Array, labels_T: jax.Array) -> jax.Array:
  picked = jnp.take_along_axis(logits_TV, labels_T[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits_TV, axis=-1) - picked


def cross_entropy_chunk(x_TD: jax.Array, head_VD: jax.Array, extras: Any) -> jax.Array:
  """Σ of cross-entropy, nats; extras = (labels [T], weights [T])."""
  labels_T, weights_T = extras
  return jnp.sum(_cross_entropy(_logits(x_TD, head_VD), labels_T) * weights_T)


def distillation_chunk(alpha: float, temperature: float, teacher_head_VD: jax.Array) -> ChunkLoss:
  """Σ of α·T²·KL(teacher‖student) at temperature T + (1−α)·CE; extras = (labels, weights, teacher x [T, D]).

  Hinton et al., arXiv 1503.02531; paper section 4.
  """

  def loss(x_TD: jax.Array, head_VD: jax.Array, extras: Any) -> jax.Array:
    labels_T, weights_T, teacher_TD = extras
    logits_TV = _logits(x_TD, head_VD)
    teacher = jax.nn.log_softmax(_logits(teacher_TD, teacher_head_VD) / temperature)
    student = jax.nn.log_softmax(logits_TV / temperature)
    kl_T = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    mixed_T = alpha * temperature**2 * kl_T + (1 - alpha) * _cross_entropy(logits_TV, labels_T)
    return jnp.sum(mixed_T * weights_T)

  return loss


def shift(tokens_BT: jax.Array, targets_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Flattened labels and weights [B·T]: position t predicts token t+1; the last predicts nothing.

  `targets` marks the tokens whose prediction counts (all but the first, if not given).
  """
  labels = jnp.roll(tokens_BT, -1, axis=1)
  counted = jnp.ones_like(tokens_BT) if targets_BT is None else targets_BT
  weights = jnp.roll(counted, -1, axis=1).astype(jnp.float32).at[:, -1].set(0.0)
  return labels.reshape(-1), weights.reshape(-1)


def next_token_loss(
  x_BTD: jax.Array, head_VD: jax.Array, tokens_BT: jax.Array, targets_BT: jax.Array | None = None
) -> jax.Array:
  """Σ of next-token cross-entropy in nats over the targets, from final normed hidden states."""
  labels, weights = shift(tokens_BT, targets_BT)
  x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
  return sum_over_chunks(cross_entropy_chunk, x_TD, head_VD, (labels, weights))
