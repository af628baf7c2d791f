"""benchmarks/growth.py: the fit on known data, and the program from end to end at toy size."""

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import growth, side_by_side

TOY = {'tokens': (32, 64), 'layers': (1, 2), 'hidden': (64, 128)}


def test_the_fit_finds_known_exponents():
  sizes = (2, 4, 8, 16)
  assert growth.exponent(sizes, [3.0 * x**1.5 for x in sizes]) == pytest.approx(1.5)
  # An offset hides the growth at small sizes, and less at large ones.
  costs = [100.0 + x**2 for x in sizes]
  assert growth.exponent(sizes, costs) < growth.exponent(sizes[-2:], costs[-2:]) < 2


def test_every_sweep_starts_from_the_base_and_none_is_measured_twice():
  points = growth.points()
  assert len(points) == sum(map(len, growth.SWEEPS.values())) - 2
  for name, sizes in growth.SWEEPS.items():
    assert growth.BASE[name] in sizes
    assert all(b == 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


def test_toy_sizes_from_end_to_end(tmp_path, monkeypatch, capsys):
  results, picture = tmp_path / 'RESULTS.md', tmp_path / 'growth.svg'
  results.write_text('# Measured\n')
  monkeypatch.setattr(side_by_side, 'RESULTS', results)
  monkeypatch.setattr(growth, 'PICTURE', picture)
  monkeypatch.setattr(growth, 'SWEEPS', TOY)
  monkeypatch.setattr(growth, 'BASE', {'tokens': 32, 'layers': 1, 'hidden': 64})
  monkeypatch.setattr(growth, 'REPEATS', 1)
  measured, measure = {}, growth.measure
  monkeypatch.setattr(growth, 'measure', lambda rounds: measured.update(measure(rounds)) or measured)
  growth.main(['--rounds=1', '--write'])
  text = results.read_text()
  assert text.startswith('# Measured\n\n## Growth of the cost\n') and text.count('\n| scoring |') == 3
  assert '(growth.svg)' in text and text.split('## ', 1)[1].strip() in capsys.readouterr().out
  assert ElementTree.fromstring(picture.read_text()).tag.endswith('svg')
  for program, rounds in measured.items():
    assert len(rounds) == 1 and len(rounds[0]) == 4
    for point, size in zip(rounds[0], growth.points(), strict=True):
      assert 0 < point['seconds'] < 10 and point['cpu'] > 0
      # A weight at least is there, with two moments in training; and two operations a weight and token.
      weights = size['layers'] * 9 * size['hidden'] ** 2
      assert point['bytes'] > (12 if program == 'training' else 4) * weights
      assert point['flops'] > 2 * weights * size['tokens']
    # All that grows with the layers but the head does: twice the layers, less than twice the operations.
    one, two = growth.along('layers', rounds, 'flops')[0]
    assert one < two < 2 * one
