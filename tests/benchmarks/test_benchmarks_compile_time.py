"""benchmarks/compile_time.py: its arithmetic, and the programs at toy size in new processes."""

import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.configs import published
from adapt_jax.models.config import count_params
from benchmarks import compile_time, side_by_side
from benchmarks.programs import compile_stage, recipe_arithmetic

TOY = dict(
  layers=3, hidden=32, head_dim=8, heads=4, kv=2, ffn=64, vocab=128, rows=4, micro=2, length=16
)  # fmt: skip


def test_widths():
  for shape in compile_time.SHAPES.values():
    for distinct in compile_time.WIDTHS.values():
      widths = compile_time.pruned(shape, distinct)['widths']
      assert len(widths) == shape['layers']
      assert len({tuple(w) for w in widths}) == min(distinct, shape['layers'])
      assert all(1 <= kv <= shape['kv'] and 0.6 * shape['ffn'] < ffn < shape['ffn'] for kv, ffn in widths)


def test_the_shapes_are_those_that_the_recipes_prune():
  for recipe, name in compile_time.RECIPES.items():
    options = from_dict(published.get_config(recipe).to_dict())
    assert options.model.source == f'facebook/{name}'
    shape = compile_time.SHAPES[name]
    t = options.train
    assert (t.batch, t.micro_batch, t.length) == (shape['rows'], shape['micro'], shape['length'])
    assert count_params(compile_stage.dense_config(shape)) > options.prune.target


def test_arithmetic_of_a_recipe():
  shape = compile_time.SHAPES['MobileLLM-350M']
  found = recipe_arithmetic.arithmetic('mobilellm_350m_to_125m', shape)
  assert found['stages'] == 20 and found['tokens'] == pytest.approx(7.9e9, rel=1e-3)
  # Six a weight and token, between the last model and the dense one, and attention.
  assert 6 * 112e6 < found['flops'] / found['tokens'] < 2 * 6 * 345e6


def test_share():
  one_second = compile_time.PEAK * compile_time.USED
  assert compile_time.share(2, 3.0, 4.0, 90 * one_second, 1) == pytest.approx(0.1)
  assert compile_time.share(2, 3.0, 4.0, 90 * one_second, 9) == pytest.approx(0.5)


def test_toy_shape_from_end_to_end(tmp_path, monkeypatch, capsys):
  results = tmp_path / 'RESULTS.md'
  results.write_text('# Measured\n')
  monkeypatch.setattr(side_by_side, 'RESULTS', results)
  monkeypatch.setattr(compile_time, 'SHAPES', {'toy': TOY})
  monkeypatch.setattr(compile_time, 'RECIPES', {})
  monkeypatch.setattr(compile_time, 'WIDTHS', {'all different': 1000})
  measured, measure = {}, compile_time.measure
  monkeypatch.setattr(compile_time, 'measure', lambda *a: measured.update(measure(*a)) or measured)
  compile_time.main(['--write', '--peer=0'])
  (found,) = measured['toy', 'all different']
  programs = compile_time.STAGE + compile_time.ONCE
  for kind in ('cold', 'warm'):
    assert tuple(found[kind]) == programs
    assert all(0 < seconds < 100 for program in found[kind].values() for seconds in program.values())
  assert found['hits'] >= len(programs) and found['bytes'] > 10_000
  text = results.read_text()
  assert text.startswith('# Measured\n\n## Compile time\n') and '| toy | 3 | all different |' in text
  assert text.split('## ', 1)[1].strip() in capsys.readouterr().out
