"""Cross-entropy and distillation over large vocabularies, in chunks of tokens.

A chunk's logits exist only inside one scan step. Under differentiation the same step also computes the
chunk's gradients, so the logits are not computed again in the backward pass.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adapt_jax.models.network.attention import soft_cap
from adapt_jax.models.network.backend import on_cpu, on_tpu
from adapt_jax.models.network.llama import head_logits
from adapt_jax.models.network.matmul import dot, products_by_shard
from adapt_jax.models.network.sharding import constrain, token_shards

# Logits held at once on a device, in fp32: 32 MiB on a CPU; elsewhere more, since each chunk reads and writes
# the gradient of the whole head: 2 GiB on GPUs (4,096 tokens of 128k ids), 512 MiB on TPUs, whose smallest
# have 16 GB.
_CHUNK_ELEMENTS, _TPU, _GPU = 2**23, 16, 64
# Of the student's probability of all ids that the teacher's cache does not name: the gradient has it as the
# divisor, and 1 − Σ q in fp32 is exact to some 1e-6.
_LEAST_REST = 1e-5

# (logits [T, V] in fp32, extras) -> scalar.
ChunkLoss = Callable[[jax.Array, Any], jax.Array]


def chunk_elements() -> int:
  """Logits that a device holds at once, at most."""
  return _CHUNK_ELEMENTS * (1 if on_cpu() else _TPU if on_tpu() else _GPU)


def _split(tree: Any, tokens: int, vocab: int) -> Any:
  """Reshapes leading axes of `tokens` to [chunks, tokens of a chunk]; zeros pad all arrays, weights included.

  If rows are split over devices, every chunk takes the same share from each device.
  """
  shards = token_shards(tokens)
  own = tokens // shards
  chunks = -(-own * vocab // chunk_elements())
  size = -(-own // min(chunks, own))

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(shards, own, *x.shape[1:])
    if missing := -own % size:
      x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(shards, -1, size, *x.shape[2:]).swapaxes(0, 1)
    return constrain(x.reshape(-1, shards * size, *x.shape[3:]), '.B')

  return jax.tree.map(split, tree)


def _join(chunks: jax.Array, tokens: int) -> jax.Array:
  """Reverses `_split`: [tokens, ...]."""
  shards = token_shards(tokens)
  x = chunks.reshape(len(chunks), shards, -1, *chunks.shape[2:]).swapaxes(0, 1)
  x = x.reshape(shards, -1, *x.shape[3:])[:, : tokens // shards]
  return constrain(x.reshape(tokens, *x.shape[2:]), 'B')


def whole(head_VD: jax.Array, dtype: Any) -> jax.Array:
  """The head in `dtype` with all of D on each device: for a loop, whose every round would gather it."""
  return constrain(head_VD.astype(dtype), 'V.')


def own_gradients(head_VD: jax.Array, shards: int) -> jax.Array:
  """Zeros [shards, D, V] for the head's gradient, which each device sums over its own tokens at first."""
  return constrain(jnp.zeros((shards, *head_VD.shape[::-1]), head_VD.dtype), 'B.V')


def summed(own_BDV: jax.Array) -> jax.Array:
  """The head's gradient [V, D], split as the head is, from that of each device's own tokens."""
  return constrain(own_BDV.sum(0), 'DV').T


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_chunks(loss: ChunkLoss, x_TD: jax.Array, head_VD: jax.Array, extras: Any) -> jax.Array:
  """Σ of loss(x headᵀ, extras) over chunks of tokens, a scalar in fp32.

  `extras` is a pytree of arrays whose leading axis is tokens, including weights: a loss must be zero for
  tokens of weight zero, which pad the last chunk. No gradient flows into `extras`.
  """
  whole_VD = whole(head_VD, x_TD.dtype)

  def step(total: jax.Array, xs: Any) -> tuple[jax.Array, None]:
    return total + loss(head_logits(whole_VD, xs[0]), xs[1]), None

  return jax.lax.scan(step, jnp.zeros(()), _split((x_TD, extras), len(x_TD), len(head_VD)))[0]


def _forward(loss: ChunkLoss, x_TD: jax.Array, head_VD: jax.Array, extras: Any) -> Any:
  own_BDV = own_gradients(head_VD, token_shards(len(x_TD)))
  value, dx_TD, own_BDV = sum_and_gradients(loss, x_TD, whole(head_VD, x_TD.dtype), own_BDV, extras)
  return value, (dx_TD, summed(own_BDV))


def _backward(loss: ChunkLoss, residuals: Any, g: jax.Array) -> Any:
  return *(g.astype(x.dtype) * x for x in residuals), None


sum_over_chunks.defvjp(_forward, _backward)


def sum_and_gradients(
  loss: ChunkLoss, x_TD: jax.Array, whole_VD: jax.Array, own_BDV: jax.Array, extras: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The value of `sum_over_chunks`, its gradient to x [T, D], and own_BDV with that to the head added.

  whole_VD: from `whole`. own_BDV: from `own_gradients`, with as many shards as split the tokens. Several sums
  can add to it before the devices' parts are `summed`.
  """
  tokens, shards = len(x_TD), len(own_BDV)

  def step(carry: Any, xs: Any) -> tuple[Any, jax.Array]:
    total, own_BDV = carry
    chunk_TD, chunk_extras = xs
    value, gradient_TV = jax.value_and_grad(loss)(head_logits(whole_VD, chunk_TD), chunk_extras)
    gradient_TV = gradient_TV.astype(x_TD.dtype)
    dx_TD = dot(gradient_TV, whole_VD, 0, x_TD.dtype)
    own_BDV += products_by_shard(chunk_TD, gradient_TV, shards, own_BDV.dtype)
    return (total + value, constrain(own_BDV, 'B.V')), dx_TD

  start = (jnp.zeros(()), own_BDV)
  (total, own_BDV), dx = jax.lax.scan(step, start, _split((x_TD, extras), tokens, len(whole_VD)))
  return total, _join(dx, tokens), own_BDV


def _cross_entropy(logits_TV: jax.Array, labels_T: jax.Array) -> jax.Array:
  # A comparison with all ids: the gradient of an indexed read would be a scatter into [T, V] zeros.
  is_label_TV = jnp.arange(logits_TV.shape[-1]) == labels_T[:, None]
  picked_T = jnp.sum(jnp.where(is_label_TV, logits_TV, 0), axis=-1)
  return jax.nn.logsumexp(logits_TV, axis=-1) - picked_T


def cross_entropy(logits_TV: jax.Array, extras: Any) -> jax.Array:
  """Σ of cross-entropy, nats; extras = (labels [T], weights [T])."""
  labels_T, weights_T = extras
  return jnp.sum(_cross_entropy(logits_TV, labels_T) * weights_T)


def fisher_cross_entropy(logits_TV: jax.Array, extras: Any) -> jax.Array:
  """The value of `cross_entropy`, with the gradient of cross-entropy to ids drawn from the model itself.

  The mean square of such gradients is the Fisher information, the curvature of the KL divergence from this
  model; that of the gradients to the data's labels is not (Kunstner et al., arXiv 1905.12558).
  extras = (labels [T], weights [T], uniform random numbers in [0, 1) [T]).
  """
  labels_T, weights_T, uniform_T = extras
  fixed_TV = jax.lax.stop_gradient(logits_TV)
  below_TV = jnp.cumsum(jax.nn.softmax(fixed_TV), axis=-1)
  drawn_T = jnp.argmax(below_TV > uniform_T[:, None] * below_TV[:, -1:], axis=-1)
  gradient = jnp.sum(_cross_entropy(logits_TV, drawn_T) * weights_T)
  value = jnp.sum(_cross_entropy(fixed_TV, labels_T) * weights_T)
  return value + gradient - jax.lax.stop_gradient(gradient)


def capped(loss: ChunkLoss, cap: float) -> ChunkLoss:
  """The loss of logits that are bounded to ±cap first (`ModelConfig.logit_cap`; 0: not)."""
  return (lambda logits_TV, extras: loss(soft_cap(logits_TV, cap), extras)) if cap else loss


def _mixed(
  alpha: float, log_p: jax.Array, log_q: jax.Array, logits_TV: jax.Array, labels_T: jax.Array, weights_T: Any
) -> jax.Array:
  """Σ of α·KL(p‖q) + (1−α)·CE."""
  loss_T = alpha * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  if alpha < 1:
    loss_T += (1 - alpha) * _cross_entropy(logits_TV, labels_T)
  return jnp.sum(loss_T * weights_T)


def distillation(alpha: float, teacher_head_VD: jax.Array, teacher_cap: float = 0.0) -> ChunkLoss:
  """Σ of α·KL(teacher‖student) + (1−α)·CE; extras = (labels, weights, teacher x [T, D]).

  Hinton et al., arXiv 1503.02531; paper section 4. KL alone, the default, as in Minitron
  (Muralidharan et al., arXiv 2407.14679), where every mixture with CE was worse.
  """

  def loss(logits_TV: jax.Array, extras: Any) -> jax.Array:
    labels_T, weights_T, teacher_TD = extras
    taught_TV = soft_cap(head_logits(teacher_head_VD, teacher_TD), teacher_cap)
    teacher = jax.nn.log_softmax(taught_TV)
    student = jax.nn.log_softmax(logits_TV)
    return _mixed(alpha, teacher, student, logits_TV, labels_T, weights_T)

  return loss


def cached_distillation(alpha: float) -> ChunkLoss:
  """Like `distillation`, on results of `teacher_top`; extras = (labels, weights, ids [T, k], log p [T, k+1]).

  All other ids are treated as one, so this is a lower bound of the KL divergence over all ids.
  """
  return functools.partial(_cached, alpha)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cached(alpha: float, logits_TV: jax.Array, extras: Any) -> jax.Array:
  return _cached_forward(alpha, logits_TV, extras)[0]


def _cached_forward(alpha: float, logits_TV: jax.Array, extras: Any) -> Any:
  labels_T, weights_T, ids_Tk, log_p_TK = extras
  total_T1 = jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True)
  top_Tk = jnp.take_along_axis(logits_TV, ids_Tk, axis=-1) - total_T1
  rest_T1 = jnp.maximum(1 - jnp.exp(top_Tk).sum(-1, keepdims=True), _LEAST_REST)
  log_q_TK = jnp.concatenate([top_Tk, jnp.log(rest_T1)], axis=-1)
  value = _mixed(alpha, log_p_TK, log_q_TK, logits_TV, labels_T, weights_T)
  return value, (logits_TV, total_T1, log_q_TK, extras)


def _cached_backward(alpha: float, residuals: Any, g: jax.Array) -> Any:
  """To the logits: q Σp − p at the ids, and q (Σp − p_rest / q_rest) at all others; CE's q − 1 at the label.

  Autodiff would copy [T, V] twice: to take the ids out of the sum, and to add the gradient at the ids.
  """
  logits_TV, total_T1, log_q_TK, (labels_T, weights_T, ids_Tk, log_p_TK) = residuals
  p_TK, q_TK, label_T1 = jnp.exp(log_p_TK), jnp.exp(log_q_TK), labels_T[:, None]
  both_T1 = alpha * p_TK.sum(-1, keepdims=True) + 1 - alpha
  at_ids_Tk = both_T1 * q_TK[:, :-1] - alpha * p_TK[:, :-1]
  others_TV = (both_T1 - alpha * p_TK[:, -1:] / q_TK[:, -1:]) * jnp.exp(logits_TV - total_T1)
  if alpha < 1:
    at_ids_Tk -= jnp.where(ids_Tk == label_T1, 1 - alpha, 0)
    others_TV -= jnp.where(jnp.arange(logits_TV.shape[-1]) == label_T1, 1 - alpha, 0)
  scale_T1, rows_T1 = g * weights_T[:, None], jnp.arange(len(ids_Tk))[:, None]
  return (scale_T1 * others_TV).at[rows_T1, ids_Tk].set(scale_T1 * at_ids_Tk), None


_cached.defvjp(_cached_forward, _cached_backward)


def _top_and_rest(logits_TV: jax.Array, ids_Tk: jax.Array) -> jax.Array:
  """Log-probabilities of these ids and of all other ids together, [T, k+1]."""
  total_T1 = jax.nn.logsumexp(logits_TV, axis=-1, keepdims=True)
  top_Tk = jnp.take_along_axis(logits_TV, ids_Tk, axis=-1)
  rows_T1 = jnp.arange(len(ids_Tk))[:, None]
  rest_T1 = jax.nn.logsumexp(logits_TV.at[rows_T1, ids_Tk].set(-jnp.inf), axis=-1, keepdims=True)
  return jnp.concatenate([top_Tk, rest_T1], axis=-1) - total_T1


def teacher_top(x_TD: jax.Array, head_VD: jax.Array, k: int, cap: float = 0.0) -> tuple[jax.Array, jax.Array]:
  """The k most likely ids of each token [T, k], in descending order, and their log p in fp32 [T, k+1].

  The last log p is that of all other ids together. Takes final normed hidden states; `row_shards` must
  divide the number of tokens.
  """

  whole_VD = whole(head_VD, x_TD.dtype)

  def step(_: None, chunk_TD: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
    logits_TV = soft_cap(head_logits(whole_VD, chunk_TD), cap)
    ids_Tk = jax.lax.top_k(logits_TV, k)[1]
    return None, (ids_Tk, _top_and_rest(logits_TV, ids_Tk))

  found = jax.lax.scan(step, None, _split(x_TD, len(x_TD), head_VD.shape[0]))[1]
  return jax.tree.map(lambda x: _join(x, len(x_TD)), found)


def shift(tokens_BT: jax.Array, targets_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Flattened labels and weights [B·T]: position t predicts token t+1; the last predicts nothing.

  `targets` marks the tokens whose prediction counts (all but the first, if not given).
  """
  labels = jnp.roll(tokens_BT, -1, axis=1)
  counted = jnp.ones_like(tokens_BT) if targets_BT is None else targets_BT
  weights = jnp.roll(counted, -1, axis=1).astype(jnp.float32).at[:, -1].set(0.0)
  return labels.reshape(-1), weights.reshape(-1)


def next_token_loss(
  x_BTD: jax.Array,
  head_VD: jax.Array,
  tokens_BT: jax.Array,
  targets_BT: jax.Array | None = None,
  cap: float = 0.0,
) -> jax.Array:
  """Σ of next-token cross-entropy in nats over the targets, from final normed hidden states."""
  labels, weights = shift(tokens_BT, targets_BT)
  x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
  return sum_over_chunks(capped(cross_entropy, cap), x_TD, head_VD, (labels, weights))


def label_log_probs(
  x_TD: jax.Array, head_VD: jax.Array, labels_T: jax.Array, cap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each label, nats in fp32 [T], and whether it is the most likely id [T].

  Takes final normed hidden states; `row_shards` must divide the number of tokens.
  """
  tokens, whole_VD = len(labels_T), whole(head_VD, x_TD.dtype)

  def step(_: None, xs: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
    logits_TV = soft_cap(head_logits(whole_VD, xs[0]), cap)
    return None, (-_cross_entropy(logits_TV, xs[1]), jnp.argmax(logits_TV, axis=-1) == xs[1])

  found = jax.lax.scan(step, None, _split((x_TD, labels_T), tokens, head_VD.shape[0]))[1]
  return jax.tree.map(lambda x: _join(x, tokens), found)
