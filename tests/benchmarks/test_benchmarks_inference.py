"""The benchmark of evaluation and generation runs end to end on a toy model, and its figures are sane."""

import re
import time
import types

import pytest

from adapt_jax.export.hf import write_hf
from benchmarks import inference
from benchmarks.side_by_side import Run
from tests.support.helpers import VARIED, random_params, tiny_config

pytest.importorskip('torch')
pytest.importorskip('transformers')
SETTINGS = {
  'windows': 2, 'window': 16, 'batch': 2, 'prompt': 8, 'new': 4, 'rows': [1, 2], 'repeats': 1
}  # fmt: skip


@pytest.mark.nightly
def test_a_toy_model_end_to_end(tmp_path, code_cache):
  config = tiny_config('llama', VARIED[:2])
  write_hf(config, random_params(config), tmp_path / 'hf')
  text = inference.measure({'pruned': str(tmp_path / 'hf')}, ['float32'], ['eager'], 1, SETTINGS)
  rows = [line.split(' | ') for line in text.splitlines() if line.startswith('| pruned | float32 |')]
  assert [row[2] for row in rows[:-1]] == list(inference.figures([1, 2]).values())
  for row in rows[:-1]:
    ours, peer, ratio = (float(re.match(r'[\d,.]+', cell)[0].replace(',', '')) for cell in row[3:6])
    assert ours > 0 and peer > 0 and ratio == pytest.approx(ours / peer, rel=0.05, abs=0.01)
  assert len(rows) == 6 and rows[-1][-1].endswith(' GB |')


def run(**answer):
  return Run(1.0, 1.0, 10**9, answer)


def test_programs_with_different_losses_are_not_compared():
  answers = {'evaluation': 1.0, 'evaluation_flops': 1}
  runs = {'ours': [run(loss=2.0, **answers)], 'eager': [run(loss=2.1, **answers)]}
  with pytest.raises(SystemExit, match='do not compute the same loss'):
    inference.table('dense', 'float32', runs, [], {})


def test_a_slow_first_call_does_not_enter_the_rates():
  programs = pytest.importorskip('benchmarks.programs.inference_torch')

  class Model:
    """The first call takes long, whatever it is asked for; a token takes a millisecond, a prompt four."""

    config = types.SimpleNamespace(vocab_size=10)
    calls = 0

    def generate(self, ids, max_new_tokens, stopping_criteria, **_):
      time.sleep(0.3 if self.calls == 0 else 0.004)
      self.calls += 1
      for token in range(max_new_tokens):
        time.sleep(0.001 * (token > 0))
        assert not stopping_criteria[0](ids, None).any()

  found = programs.generate(Model(), SETTINGS | {'repeats': 3}, 2, [None])
  assert Model.calls == 0 and found['generate_2_compile'] > 0.2
  assert 0 < found['decode_2'] <= 2 / 0.001 and 0 < found['prefill_2'] <= 2 * 8 / 0.004
