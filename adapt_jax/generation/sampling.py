"""The next token from logits: greedy, or drawn with temperature, top-k and top-p."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

_HIGHEST_BITS = 0x3F800000  # of 1.0, the largest probability


def stop_ids(generation: dict[str, Any], tokenizer: Any) -> frozenset[int]:
  """Ids that end a text: eos_token_id of generation_config.json, one or several, else the tokenizer's."""
  found = generation.get('eos_token_id')
  if found is None:
    found = tokenizer.eos_token_id
  return frozenset(found if isinstance(found, list) else [] if found is None else [found])


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Args:
    temperature: divides the logits; 0 = always the most likely token, ignoring the other settings.
    top_k: draw only from this number of most likely tokens; 0 = all.
    top_p: draw only from the most likely tokens that together have this share of the probability, after
      top_k (nucleus sampling, Holtzman et al., arXiv 1904.09751).
    repetition_penalty: divides positive and multiplies negative logits of ids that the prompt or the new
      tokens contain (Keskar et al., arXiv 1909.05858), with temperature 0 too; 1 = off.

  Tokens that are as likely as the last one kept are also kept.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  repetition_penalty: float = 1.0


GREEDY = Sampling()


def sample(logits_BV: jax.Array, keys_B: jax.Array, settings: dict[str, jax.Array]) -> jax.Array:
  """Token ids [B] from fp32 logits; `settings` are the fields of `Sampling`; new values need no new compile.

  A row's token depends only on its own logits and key.
  """
  return jax.lax.cond(settings['temperature'] > 0, _draw, _greedy, logits_BV, keys_B, settings)


def penalised(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
  """The logits after `Sampling.repetition_penalty`."""
  changed_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(seen_BV, changed_BV, logits_BV)


def _greedy(logits_BV: jax.Array, keys_B: jax.Array, settings: dict[str, jax.Array]) -> jax.Array:
  return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def _draw(logits_BV: jax.Array, keys_B: jax.Array, settings: dict[str, jax.Array]) -> jax.Array:
  below_BV = logits_BV - logits_BV.max(-1, keepdims=True)  # before the division, for very low temperatures
  p_BV = jax.nn.softmax(below_BV / settings['temperature'], axis=-1)
  all_kept = (settings['top_k'] <= 0) & (settings['top_p'] >= 1)
  p_BV = jax.lax.cond(all_kept, lambda p_BV, _: p_BV, _kept, p_BV, settings)
  return jax.vmap(_drawn)(keys_B, p_BV)


def _kept(p_BV: jax.Array, settings: dict[str, jax.Array]) -> jax.Array:
  """The probabilities, not normalised, of the tokens that top_k and top_p keep."""
  top_k = jnp.where(settings['top_k'] > 0, settings['top_k'], p_BV.shape[-1]).astype(jnp.float32)
  p_BV = _likeliest(p_BV, jnp.ones_like(p_BV), top_k)
  need_B = jnp.maximum(settings['top_p'] * p_BV.sum(-1), jnp.finfo(jnp.float32).tiny)  # at least one
  return _likeliest(p_BV, p_BV, need_B)


def _drawn(key: jax.Array, p_V: jax.Array) -> jax.Array:
  """An index in proportion to p: first a block of it, then one in the block.

  Random numbers for all of 49,152 tokens take a CPU longer than a small model's layers.
  """
  size = math.isqrt(p_V.size - 1) + 1
  p_NS = jnp.pad(p_V, (0, -p_V.size % size)).reshape(-1, size)
  first, second = jax.random.split(key)
  # The default mode hardly ever draws tokens less likely than 3e-8, of which a large vocabulary has many.
  block = jax.random.categorical(first, jnp.log(p_NS.sum(1)), mode='high')
  inside = jax.random.categorical(second, jnp.log(p_NS[block]), mode='high')
  return (block * size + inside).astype(jnp.int32)


def _likeliest(p_BV: jax.Array, weights_BV: jax.Array, need: jax.Array) -> jax.Array:
  """p, set to 0 below the highest threshold from which on the weights sum to `need` or more.

  The threshold is found by bisection over the bits of floats, which sort in the same order: thirty sums
  instead of a sort, which takes XLA's CPU backend 8 ms for 49,152 tokens, a third of a small model's step.
  """

  def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low_B, high_B = bounds
    middle_B = (low_B + high_B + 1) // 2
    threshold_B = jax.lax.bitcast_convert_type(middle_B, jnp.float32)
    enough_B = jnp.where(p_BV >= threshold_B[:, None], weights_BV, 0).sum(-1) >= need
    return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B - 1)

  B = p_BV.shape[0]
  bounds = jnp.zeros(B, jnp.int32), jnp.full(B, _HIGHEST_BITS, jnp.int32)
  low_B, _ = jax.lax.fori_loop(0, _HIGHEST_BITS.bit_length(), halve, bounds)
  return jnp.where(p_BV >= jax.lax.bitcast_convert_type(low_B, jnp.float32)[:, None], p_BV, 0)
