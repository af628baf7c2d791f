"""Sparsity schedule and exact landing."""

import dataclasses

import numpy as np

from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig, channel_params
from adapt_jax.pruning.widths import MAX_SPARSITY, Allocator, Widths, advance, normalise


def make_config(layers=6, kv=4, group=2, ffn=96, **kw):
  shapes = (LayerShape(kv * group, kv, ffn),) * layers
  return ModelConfig('llama', 101, 32, 8, shapes, RopeConfig(1e4), 1e-5, True, **kw)


def test_normalise_is_the_papers_formula():
  values = np.array([-0.02, -0.7, -0.9, -0.98])
  centred = values - values.mean()
  np.testing.assert_allclose(normalise(values), centred / np.abs(centred).max())
  assert np.abs(normalise(values)).max() == 1


def test_rounding_makes_no_layer_more_important_than_another():
  """Else some of equal layers would be cut at the full amplitude, and others spared, by chance."""
  np.testing.assert_array_equal(normalise(np.full(5, 0.1)), np.zeros(5))
  for value in (0.7, -0.98, 1e6):
    values = np.full(5, value)
    values[2] = np.nextafter(value, np.inf)
    assert np.ptp(values) > 0
    np.testing.assert_array_equal(normalise(values), np.zeros(5))
  # What is small and no rounding counts.
  np.testing.assert_allclose(normalise(np.array([0.0, 0.0, 1e-9])), [-0.5, -0.5, 1])


def test_advance_clips_and_gives_credit():
  s = advance(np.array([0.0, 0.98, 0.5]), np.array([-0.01, 0.02, -0.02]))
  np.testing.assert_allclose(s, [0.0, MAX_SPARSITY, 0.48])


def test_widths_floor_and_whole_kv_groups():
  a = Allocator(make_config(layers=2, kv=3, ffn=100))
  # 3 groups of 8 rows: s = 0.33 leaves floor(24 * 0.67) = 16 rows, so floor(8 / 8) = 1 group goes.
  w = a.widths(np.array([0.33, 0.005]))
  assert w.kv.tolist() == [2, 3] and w.ffn.tolist() == [67, 99]
  # A layer keeps its last group and channel whatever s is.
  w = a.widths(np.array([0.99, 0.99]))
  assert w.kv.min() >= 1 and w.ffn.min() >= 1


def test_rounding_of_the_sparsity_costs_no_kv_group():
  """Summed over eighteen steps s leaves 17 of 24 rows, but for rounding: 7 rows are no whole group of 8."""
  sparsity = np.zeros(2)
  for _ in range(18):
    sparsity = advance(sparsity, np.full(2, 7 / 24 / 18))
  assert (24 * (1 - sparsity) < 17).all()
  assert Allocator(make_config(layers=2, kv=3)).widths(sparsity).kv.tolist() == [3, 3]


def test_a_stall_takes_ordinary_steps_and_keeps_its_books():
  """Where A exceeds ρ/T and all layers are equally important but one, nothing may go in one great cut."""
  config = make_config(layers=4, kv=1)
  a = Allocator(config)
  widths, s = a.full, np.zeros(4)
  target = a.cost(a.full) // 2
  removed = []
  for _ in range(400):
    before = a.cost(widths)
    widths, s = a.step(widths, s, np.array([-0.015, -0.015, -0.015, -0.001]), target)
    removed.append((before - a.cost(widths)) / a.cost(a.full))
    np.testing.assert_array_less(1 - widths.ffn / a.full.ffn - 2 / a.full.ffn, s)
    if a.cost(widths) <= target:
      break
  assert target - channel_params(config) < a.cost(widths) <= target
  assert max(removed) < 0.03


def test_a_landing_leaves_the_credit_of_layers_that_it_does_not_narrow():
  """ALGORITHM 3: a layer of sparsity 0.3 that is half as wide waits until the sparsity passes a half."""
  config = make_config(layers=3, ffn=1000)
  a = Allocator(config)
  widths = dataclasses.replace(a.full, ffn=np.array([500, 1000, 1000]))
  s, rate = np.array([0.3, 0.0, 0.0]), np.array([-0.02, 0.04, 0.04])
  landed, reached = a.land(widths, s, rate, a.cost(widths) - 20 * channel_params(config))
  assert landed.ffn[0] == 500 and landed.ffn.sum() == 2480
  assert 0.28 < reached[0] < 0.3


def test_kv_group_that_lands_exactly_on_the_target_goes():
  """Else MLP channels, which matter more by the order given, go in its place."""
  a = Allocator(make_config(layers=1, kv=2, ffn=100))
  s = np.array([0.435])  # the group falls at 0.4375, the next channel at 0.44
  widths = a.widths(s)
  target = a.cost(Widths(np.array([1]), widths.ffn))
  landed, _ = a.land(widths, s, np.array([0.2]), target)
  assert landed.kv.tolist() == [1] and landed.ffn.tolist() == widths.ffn.tolist() == [56]
  assert a.cost(landed) == target


def test_what_a_passed_over_kv_group_leaves_goes_in_ordinary_steps():
  """A KV group is worth 16 channels here, 15 must go: two steps' worth, then the rest on fresh scores."""
  config = make_config(layers=1, kv=2, ffn=200)
  a = Allocator(config)
  s = np.array([0.42])  # the group falls at 0.4375
  widths = a.widths(s)
  target = a.cost(widths) - 15 * channel_params(config)
  cuts = []
  while a.cost(widths) > target:
    before = widths
    widths, s = a.step(widths, s, np.array([0.02]), target)
    cuts.append(int(before.ffn[0] - widths.ffn[0]))
  assert widths.kv.tolist() == [2] and a.cost(widths) == target
  # 8 channels are two steps' worth; the ninth lies on the border, to rounding.
  assert sum(cuts) == 15 and len(cuts) == 2 and max(cuts) <= 2 * 0.02 * 200 + 1


def test_widths_do_not_regrow_on_credit():
  a = Allocator(make_config(layers=2))
  narrow = Widths(np.array([2, 4]), np.array([40, 96]))
  widths, s = a.step(narrow, np.array([0.6, 0.0]), np.array([-0.1, 0.02]), 0)
  assert widths.ffn.tolist() == [40, 94] and widths.kv.tolist() == [2, 4]
  np.testing.assert_allclose(s, [0.5, 0.02])
