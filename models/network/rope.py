"""Rotary position embeddings (Su et al., arXiv 2104.09864), in fp32, as Hugging Face's `rotate_half`."""

import jax
import jax.numpy as jnp
import numpy as np

from adapt_jax.models.config import LinearScaling, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
  """Angular frequencies [H/2] in radians per position, with the scaling if configured.

  The scaling of LLaMA 3.1 (`transformers` rope type `llama3`) divides the
  frequencies of wavelengths beyond `original_max_position / low_freq_factor` by
  `factor`, keeps those below `original_max_position / high_freq_factor`, and
  interpolates linearly in between. Linear scaling divides all by `factor`.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  freqs = (1.0 / (np.float32(rope.theta) ** exponents)).astype(np.float32)
  if rope.scaling is None:
    return freqs
  s = rope.scaling
  if isinstance(s, LinearScaling):
    return freqs / np.float32(s.factor)
  wavelengths = 2 * np.pi / freqs
  smooth = (s.original_max_position / wavelengths - s.low_freq_factor) / (
    s.high_freq_factor - s.low_freq_factor
  )
  smooth = np.clip(smooth, 0.0, 1.0)
  return ((1 - smooth) * freqs / s.factor + smooth * freqs).astype(np.float32)


def rope_tables(
  rope: RopeConfig, head_dim: int, positions: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine tables [..., T, H/2] in fp32 for integer positions [..., T].

  For numpy positions the tables are constants of the program, 4·T·H bytes; otherwise XLA recomputes them
  wherever they are used.
  """
  angles = positions[..., None].astype(np.float32) * inverse_frequencies(rope, head_dim)
  if isinstance(angles, np.ndarray):
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
  return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, cos_TC: jax.Array, sin_TC: jax.Array) -> jax.Array:
  """Rotates x [B, T, N, H] by the tables [T, H/2] or [B, T, H/2]; keeps the dtype."""
  cos, sin = cos_TC[..., None, :], sin_TC[..., None, :]
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x_BTNH.dtype)
