"""benchmarks/gguf_parity.py on a tiny model."""

import numpy as np
import pytest

import adapt_jax as aj
from benchmarks import gguf_parity
from tests.support.helpers import UNIFORM, random_params, tiny_config
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.tokenizers_for_tests import tiny_tokenizer

pytest.importorskip('torch')
pytest.importorskip('transformers')


@needs_llama_cpp
def test_three_programs_agree_on_a_file_in_fp32(tmp_path):
  tokenizer = tiny_tokenizer()
  config = tiny_config('qwen2', UNIFORM, vocab_size=len(tokenizer), head_dim=8)
  model = aj.Model(config, random_params(config), tokenizer)
  aj.save(model, tmp_path, formats=('gguf',), gguf_types=('F32',))
  text = tmp_path / 'text.txt'
  text.write_text('It was the best of times, it was the worst of times. ' * 40)
  (file,) = (tmp_path / 'gguf').glob('*.gguf')
  row = gguf_parity.line(file, [str(text)], windows=2, length=32).strip('| ').split(' | ')
  assert row[0] == file.name and float(row[3]) < 1e-6 and float(row[4]) < 1e-3
  figures = [float(x) for x in row[5:]]
  assert figures == pytest.approx([figures[0]] * 3, rel=1e-3) and figures[0] > 1


def test_the_mean_loss_is_of_every_token_after_the_first():
  rows = np.array([[0, 1, 2]])
  certain = np.full((3, 4), -1e9)
  certain[0, 1] = certain[1, 2] = 0
  assert gguf_parity.mean_loss([certain], rows) == 0
  assert gguf_parity.mean_loss([np.zeros((3, 4))], rows) == pytest.approx(np.log(4))
