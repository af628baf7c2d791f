"""cuDNN's attention without a card: what is lowered for CUDA, and all but the kernels themselves, run on CPU.

On CPU `jax.nn.dot_product_attention` in plain XLA stands in for the two kernels, at the very place where JAX
calls them: batching, partitioning over a mesh and differentiation are JAX's own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax._src.interpreters import mlir

from adapt_jax.models.network import attention, flash
from adapt_jax.models.network.backend import made_for

ROWS = 2


def attend(q, k, v, scale, mask_type, sliding_window_length):
  assert mask_type == cudnn.MaskType.CAUSAL
  back = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])
  seen = (back >= 0) & (back < (sliding_window_length or q.shape[1]))
  return jax.nn.dot_product_attention(q, k, v, scale=scale, mask=seen[None, None], implementation='xla')


def forward(q, k, v, *_, scale, mask_type, sliding_window_length, is_training, **__):
  out = attend(q, k, v, scale, mask_type, sliding_window_length)
  statistics = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))
  return [out, statistics] if is_training else [out]


def backward(q, k, v, *rest, scale, mask_type, sliding_window_length, **_):
  return jax.vjp(lambda *qkv: attend(*qkv, scale, mask_type, sliding_window_length), q, k, v)[1](rest[-1])


mlir.register_lowering(
  cudnn._dot_product_attention_fwd_p, mlir.lower_fun(forward, multiple_results=True), platform='cpu'
)
mlir.register_lowering(
  cudnn._dot_product_attention_bwd_p, mlir.lower_fun(backward, multiple_results=True), platform='cpu'
)


@pytest.fixture
def card(monkeypatch):
  """A Hopper with cuDNN, as far as JAX's Python can tell; the calls of cuDNN's attention."""
  calls = []
  whole = flash.flash_attention
  monkeypatch.setattr(flash, 'flash_attention', lambda *args, **kw: calls.append(args) or whole(*args, **kw))
  monkeypatch.setattr(flash, 'widest_head', lambda: 256)
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91_800)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda version: True)
  return calls


def jit(fn):
  """What is run once only: most of its time is the compiler's."""
  return jax.jit(fn, compiler_options={'xla_backend_optimization_level': 0})


def inputs(T, N, K, H, documents, scale=1.0):
  """bf16 q, k, v, and segments of random lengths, the last of them padding."""
  rng = np.random.default_rng(T + N)
  q, k, v = (scale * rng.standard_normal((ROWS, T, heads, H)).astype(np.float32) for heads in (N, K, K))
  segments = (
    np.sort(rng.integers(1, documents + 1, (ROWS, T)), axis=1).astype(np.int32) if documents else None
  )
  if documents:
    segments[:, -T // 5 :] = 0
  return [jnp.bfloat16(x) for x in (q, k, v)], segments


# -- where it is used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'dtype,H,T,segmented,widest,expected',
  [
    (jnp.bfloat16, 64, 1024, True, 128, True),  # 64 + 16
    (jnp.bfloat16, 128, 1024, True, 128, False),  # 144: only Hopper
    (jnp.bfloat16, 128, 1024, True, 256, True),
    (jnp.bfloat16, 60, 1024, False, 128, False),
    (jnp.bfloat16, 64, 1023, False, 128, False),
    (jnp.bfloat16, 264, 1024, False, 256, False),
    (jnp.bfloat16, 64, (1 << 16) + 2, True, 128, False),  # more segments than numbers
    (jnp.float32, 64, 1024, False, 128, False),
    (jnp.bfloat16, 64, 1024, False, 0, False),  # no cuDNN
  ],
)
def test_what_cudnn_takes(dtype, H, T, segmented, widest, expected, monkeypatch):
  monkeypatch.setattr(flash, 'widest_head', lambda: widest)
  assert flash.takes(jax.ShapeDtypeStruct((2, T, 9, H), dtype), segmented) is expected


class Device:
  """Of another platform."""

  def __init__(self, version, capability):
    self.client, self.compute_capability = self, capability
    self.platform_version, self.platform = version, 'gpu'


@pytest.mark.parametrize(
  'version,capability,expected',
  [
    ('PJRT C API\ncuda 12080', '7.5', 0),
    ('PJRT C API\ncuda 12080', '8.6', 128),
    ('PJRT C API\ncuda 12080', '9.0', 256),
    ('PJRT C API\nrocm 60300', 'gfx942', 0),
  ],
)
def test_by_generation(version, capability, expected, monkeypatch):
  """Of the device at hand; what the code is made for takes precedence."""
  monkeypatch.setattr(jax, 'local_devices', lambda: [Device(version, capability)])
  assert flash.widest_head() == expected
  with made_for('tpu'):
    assert flash.widest_head() == 0
  with made_for('cuda', (9, 0)):
    assert flash.widest_head() == 256


# -- what it computes --------------------------------------------------------------------------------------


def outputs(attention, qkv, segments, dtype):
  """Output and gradients, of tokens that are no padding, in fp32."""
  counts = np.ones(qkv[0].shape[:2]) if segments is None else segments > 0

  def run(q, k, v):
    out = attention(q, k, v, segments).astype(jnp.float32)
    pattern = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return (out * pattern * counts[..., None, None]).sum(), out

  qkv = [x.astype(dtype) for x in qkv]
  (_, out), gradients = jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(*qkv)
  return [np.asarray(x, np.float32) * counts[..., None, None] for x in (out, *gradients)]


@pytest.mark.parametrize(
  'N,K,H,documents,window',
  [(9, 3, 64, 0, None), (5, 1, 64, 10**6, None), (4, 2, 128, 2, None), (4, 2, 128, 2, 7), (4, 1, 256, 0, 3)],
)
def test_agrees_with_the_plain_form(N, K, H, documents, window, card, monkeypatch):
  """Odd head counts; nearly every token its own segment; as close to fp32 as the plain form in bf16 is."""
  qkv, segments = inputs(22, N, K, H, documents)
  form = functools.partial(attention.causal_attention, window=window)
  found = outputs(form, qkv, segments, jnp.bfloat16)
  assert len(card) == 1
  monkeypatch.setattr(flash, 'widest_head', lambda: 0)
  exact = outputs(form, qkv, segments, jnp.float32)
  plain = outputs(form, qkv, segments, jnp.bfloat16)
  for a, b, c in zip(found, plain, exact, strict=True):
    assert np.abs(a - c).max() <= 2.5 * np.abs(b - c).max()  # both round to bf16, at other places


def test_caps_are_not_left_out(card):
  """cuDNN has none."""
  qkv, _ = inputs(22, 2, 1, 64, 0)
  jax.eval_shape(lambda *qkv: attention.causal_attention(*qkv, form=attention.Logits(1.0, 2.0)), *qkv)
  assert not card


def test_large_logits_do_not_leak_into_other_segments(card):
  """Logits of thousands; what another segment holds must not change a bit."""
  qkv, segments = inputs(64, 2, 1, 64, 5, scale=10.0)
  other = (segments == segments[0, 40]) & (np.arange(ROWS)[:, None] == 0)
  run = jax.jit(attention.causal_attention)
  first = run(*qkv, segments)
  changed = [jnp.where(other[..., None, None], x, -3 * x[:, ::-1]) for x in qkv]
  np.testing.assert_array_equal(np.asarray(first)[other], np.asarray(run(*changed, segments))[other])
