"""Chunked losses against their plain forms, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.network.backend import compiler_options, made_for
from adapt_jax.training import loss


@pytest.fixture(params=[64, 512, 2**25])
def chunk(request, monkeypatch):
  monkeypatch.setattr(loss, '_CHUNK_ELEMENTS', request.param)


def arrays(tokens=23, hidden=8, vocab=37):
  keys = jax.random.split(jax.random.key(0), 4)
  x, head = jax.random.normal(keys[0], (tokens, hidden)), jax.random.normal(keys[1], (vocab, hidden))
  labels = jax.random.randint(keys[2], (tokens,), 0, vocab)
  return x, head, labels, jax.random.uniform(keys[3], (tokens,))


def agree(ours, plain, x, head, rtol=1e-5):
  """Value and gradients of two functions of the hidden states and the head."""
  value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(x, head)
  np.testing.assert_allclose(value, plain(x, head), rtol=rtol)
  for a, b in zip(gradients, jax.grad(plain, (0, 1))(x, head), strict=True):
    np.testing.assert_allclose(a, b, rtol=10 * rtol, atol=1e-6)


@pytest.mark.parametrize('cap,scale', [(0.0, 3), (1.5, 1)])
def test_cross_entropy_of_logits_and_of_bounded_ones(chunk, cap, scale):
  x, head, labels, weights = arrays()

  def ours(x, head):
    return scale * loss.sum_over_chunks(loss.capped(loss.cross_entropy, cap), x, head, (labels, weights))

  def plain(x, head):
    logits = cap * jnp.tanh(x @ head.T / cap) if cap else x @ head.T
    return -scale * (jax.nn.log_softmax(logits)[jnp.arange(23), labels] * weights).sum()

  agree(ours, plain, x, head, 1e-6)


def make_teacher():
  return jax.random.normal(jax.random.key(9), (23, 6)), jax.random.normal(jax.random.key(8), (37, 6))


def test_distillation(chunk):
  x, head, labels, weights = arrays()
  teacher, teacher_head = make_teacher()

  def ours(x, head):
    extras = labels, weights, teacher
    return loss.sum_over_chunks(loss.distillation(0.3, teacher_head), x, head, extras)

  def plain(x, head):
    p = jax.nn.softmax(teacher @ teacher_head.T)
    kl = (p * (jnp.log(p) - jax.nn.log_softmax(x @ head.T))).sum(-1)
    ce = -jax.nn.log_softmax(x @ head.T)[jnp.arange(23), labels]
    return ((0.3 * kl + 0.7 * ce) * weights).sum()

  agree(ours, plain, x, head)


def test_gradients_to_drawn_ids_have_the_second_moment_of_the_fisher_information(chunk):
  """And the value is the cross-entropy of the labels."""
  x, head, labels, _ = arrays()
  draws = 4000

  @jax.jit
  def second_moment(x, head, key):
    def one(uniform):
      def f(x):
        return loss.sum_over_chunks(loss.fisher_cross_entropy, x, head, (labels, jnp.ones(23), uniform))

      value, gradient = jax.value_and_grad(f)(x)
      return value, jnp.einsum('td,te->de', gradient, gradient)

    values, moments = jax.lax.map(one, jax.random.uniform(key, (draws, 23)))
    return values, moments.mean(0), moments.std(0) / draws**0.5

  values, found, error = second_moment(x, head, jax.random.key(1))
  logp = jax.nn.log_softmax(x @ head.T)
  np.testing.assert_allclose(values, -logp[jnp.arange(23), labels].sum(), rtol=1e-5)
  # Of softmax the Fisher information is the Hessian of the logits' normaliser: headᵀ (diag p − p pᵀ) head.
  p = jnp.exp(logp)
  mean = p @ head
  exact = jnp.einsum('tv,vd,ve->de', p, head, head) - mean.T @ mean
  assert (abs(found - exact) < 4.5 * error).all() and (error < 0.1 * jnp.abs(exact).max()).all()


@pytest.mark.parametrize('alpha', [0.3, 1.0])
def test_distillation_from_the_likeliest_ids(chunk, alpha):
  """The ids that are not kept count as one, for teacher and student alike."""
  x, head, labels, weights = arrays()
  teacher, teacher_head = make_teacher()
  ids, log_p = jax.jit(lambda: loss.teacher_top(teacher, teacher_head, 5))()
  p = jax.nn.softmax(teacher @ teacher_head.T)
  kept = jnp.argsort(-p, axis=-1)[:, :5]
  np.testing.assert_array_equal(ids, kept)

  def merged(p):
    top = jnp.take_along_axis(p, kept, axis=-1)
    return jnp.concatenate([top, 1 - top.sum(-1, keepdims=True)], axis=-1)

  np.testing.assert_allclose(jnp.exp(log_p), merged(p), rtol=1e-4)

  def ours(x, head):
    extras = labels, weights, ids, log_p
    return loss.sum_over_chunks(loss.cached_distillation(alpha), x, head, extras)

  def plain(x, head):
    logits = x @ head.T
    log_q = jax.nn.log_softmax(logits)
    rest = jax.nn.logsumexp(log_q.at[jnp.arange(23)[:, None], ids].set(-jnp.inf), axis=-1, keepdims=True)
    of_ids = jnp.concatenate([jnp.take_along_axis(log_q, ids, axis=-1), rest], axis=-1)
    kl = (jnp.exp(log_p) * (log_p - of_ids)).sum(-1)
    return ((alpha * kl - (1 - alpha) * log_q[jnp.arange(23), labels]) * weights).sum()

  agree(ours, plain, x, head, 1e-6)


def test_a_student_that_is_certain_of_one_id_learns_from_the_likeliest_ids():
  """Its probability of all other ids is 0 in fp32."""
  logits, ids = jnp.zeros((1, 37)).at[0, 3].set(200.0), jnp.array([[3, 5]])
  log_p = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
  extras = jnp.array([3]), jnp.ones(1), ids, log_p
  value, gradient = jax.value_and_grad(loss.cached_distillation(1.0))(logits, extras)
  assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
  np.testing.assert_allclose(gradient[0, ids[0]], [0.5, -0.25], rtol=1e-5)


def test_only_targets_count():
  """Position t predicts token t+1 of its own row; unmarked targets and row ends weigh nothing."""
  tokens = jnp.array([[5, 6, 7, 8], [1, 2, 3, 4]])
  targets = jnp.array([[False, False, True, True], [False, True, False, False]])
  labels, weights = loss.shift(tokens, targets)
  counted = [(int(label), i) for i, (label, w) in enumerate(zip(labels, weights, strict=True)) if w]
  assert counted == [(7, 1), (8, 2), (2, 4)]


@pytest.mark.parametrize('platform,at_once', [('cpu', 171), ('gpu', 1024)])
def test_so_many_tokens_logits_are_held_at_once(platform, at_once):
  """Of 1,024 tokens and SmolLM2's vocabulary, forward and backward: 32 MiB on a CPU, all elsewhere."""
  tokens, vocab, hidden = 1024, 49_152, 8
  shapes = [jax.ShapeDtypeStruct((n, hidden), jnp.float32) for n in (tokens, vocab)]
  extras = jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((tokens,), jnp.float32)

  def run(x, head, extras):
    return loss.sum_over_chunks(loss.cross_entropy, x, head, extras)

  with made_for(platform):
    lowered = jax.jit(jax.grad(run, (0, 1))).lower(*shapes, extras)
  program = lowered.compile(compiler_options())
  logits = 4 * at_once * vocab
  assert logits <= program.memory_analysis().temp_size_in_bytes < 3.5 * logits
