"""Tokens are drawn with the probabilities that temperature, top-k and top-p leave."""

import math
import re

import jax
import numpy as np
import pytest

from adapt_jax.generation.sampling import Sampling, sample

ROWS = 20_000
P = np.array([0.05, 0.5, 0.15, 0.3])


def draw(sampling, probabilities=P, rows=ROWS, seed=0):
  settings = {
    'temperature': np.float32(sampling.temperature),
    'top_k': np.int32(sampling.top_k),
    'top_p': np.float32(sampling.top_p),
  }
  logits = np.tile(np.log(probabilities).astype(np.float32) + 3, (rows, 1))
  return np.asarray(jax.jit(sample)(logits, jax.random.split(jax.random.key(seed), rows), settings))


@pytest.mark.parametrize(
  'sampling,expected',
  [
    (Sampling(1.0), P),
    (Sampling(2.0), np.sqrt(P)),
    (Sampling(0.5), P**2),
    (Sampling(1.0, top_k=2), P * [0, 1, 0, 1]),
    (Sampling(1.0, top_k=9), P),
    (Sampling(1.0, top_p=0.79), P * [0, 1, 0, 1]),
    (Sampling(1.0, top_p=0.81), P * [0, 1, 1, 1]),
    (Sampling(1.0, top_k=2, top_p=0.6), P * [0, 1, 0, 0]),  # 0.5 of the 0.8 that top_k leaves is 0.625
    (Sampling(2.0, top_p=0.70), np.sqrt(P) * [0, 1, 1, 1]),  # 0.67 of the first two, after the temperature
  ],
)
def test_frequencies(sampling, expected):
  expected = expected / expected.sum()
  found = np.bincount(draw(sampling), minlength=4) / ROWS
  np.testing.assert_array_less(
    np.abs(found - expected), 4.5 * np.sqrt(expected * (1 - expected) / ROWS) + 1e-9
  )


@pytest.mark.parametrize(
  'sampling',
  [Sampling(), Sampling(1e-12), Sampling(1.5, top_k=1), Sampling(1.5, top_p=1e-6), Sampling(1.5, top_p=0)],
  ids=['0', 'low', 'top_k', 'top_p', 'top_p 0'],
)
def test_the_likeliest_token_alone(sampling):
  p = np.random.default_rng(0).dirichlet(np.ones(1000))
  assert set(draw(sampling, p, rows=200)) == {p.argmax()}


def test_a_nucleus_of_many_tokens_is_the_sorted_one():
  p = np.random.default_rng(1).dirichlet(np.full(500, 0.3))
  order = np.argsort(-p)
  nucleus = order[: np.searchsorted(np.cumsum(p[order]), 0.6) + 1]
  found = set(draw(Sampling(1.0, top_p=0.6), p).tolist())
  assert found <= set(nucleus.tolist()) and len(found) > 0.9 * len(nucleus)


def test_noise_reaches_tokens_of_very_low_probability():
  """The noise of 23 bits is at most 16, so that a token of 3e-8 would be drawn a fourteenth as often."""
  settings = {'temperature': np.float32(1), 'top_k': np.int32(0), 'top_p': np.float32(1)}
  text = str(
    jax.make_jaxpr(sample)(np.zeros((1, 1000), np.float32), jax.random.split(jax.random.key(0), 1), settings)
  )
  drawn = re.findall(r'random_bits\[\s*bit_width=(\d+)\s*shape=\(([\d, ]+)\)', text)
  bits = sum(int(width) * math.prod(int(x) for x in re.findall(r'\d+', shape)) for width, shape in drawn)
  assert bits == 64 * 32  # the same for a block of tokens and for a token in it
