"""Exports in the real vLLM and MLX-LM, each in a virtual environment of its own: make test-serving."""

import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import logits, random_params, random_tokens, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

pytestmark = pytest.mark.serving
ROOT = pathlib.Path(__file__).parents[2]
DEMO = ROOT / 'out/demo/hf'
TEXT = 'The history of the city begins with a small settlement on the bank of the river, where'
# vLLM's attention on a CPU takes no head_dim below 32.
LAYERS = (LayerShape(2, 1, 24), LayerShape(4, 2, 40), LayerShape(2, 1, 64), LayerShape(6, 3, 48))
MODELS = {
  'llama': {},
  'mistral': {},
  'qwen2': {'output_bias': True},
  'qwen3': {'qkv_bias': True},
}
IN_VLLM = ('llama', 'qwen2')  # half a minute each


def tiny(family, directory):
  config = tiny_config(family, LAYERS, vocab_size=320, head_dim=32, **MODELS[family])
  write_hf(config, random_params(config), directory, tokenizer=tiny_tokenizer())
  return random_tokens(config).tolist()


def demo(directory):
  """The demo's model as it is exported today, and rows of text."""
  if not DEMO.exists():
    pytest.skip('make demo has not been run')
  source = open_source(str(DEMO))
  tokenizer = source.load_tokenizer()
  write_hf(source.config, source.load_params(), directory, tokenizer=tokenizer)
  ids = tokenizer(TEXT).input_ids
  return [ids[:16], ids[1:17]]


def check(program, directory, prompts, tolerance):
  """Scores the prompts and goes on greedily there, and compares both with ours."""
  python = ROOT / '.venv-serving' / program / 'bin/python'
  if not python.exists():
    pytest.skip(f'{python.parent.parent.name} is not installed: make test-serving does it')
  asked, answer = directory.with_name('prompts.json'), directory.with_name('answer.json')
  asked.write_text(json.dumps(prompts))
  command = [python, ROOT / f'benchmarks/programs/run_{program}.py', directory, asked, answer]
  environment = os.environ | {'HF_HOME': str(directory.with_name('cache'))}
  done = subprocess.run(
    [str(x) for x in command], env=environment, cwd=directory.parent, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
  found = json.loads(answer.read_text())
  compare(directory, np.array(prompts), found, tolerance)


def compare(directory, prompts, found, tolerance):
  source = open_source(str(directory))
  rows = np.concatenate([prompts, np.array(found['tokens'])], 1)
  ours = np.asarray(jax.nn.log_softmax(logits(source.config, source.load_params(np.float32), rows)))
  length = prompts.shape[1]
  expected = np.take_along_axis(ours[:, : length - 1], prompts[:, 1:, None], -1)[..., 0]
  difference = np.abs(np.array(found['logprobs']) - expected).max()
  print(f'largest difference of log-probabilities: {difference:.1e}')
  assert difference < tolerance
  assert np.array_equal(rows[:, length:], ours[:, length - 1 : -1].argmax(-1))


@pytest.mark.parametrize('family', MODELS)
def test_mlx_lm(family, tmp_path):
  check('mlx', tmp_path / 'hf', tiny(family, tmp_path / 'hf'), 2e-4)


@pytest.mark.parametrize('family', IN_VLLM)
def test_vllm(family, tmp_path):
  check('vllm', tmp_path / 'hf', tiny(family, tmp_path / 'hf'), 2e-4)


@pytest.mark.parametrize('program', ['mlx', 'vllm'])
def test_the_demos_model(program, tmp_path):
  check(program, tmp_path / 'hf', demo(tmp_path / 'hf'), 5e-4)


def test_mlx_lm_takes_what_transformers_saved(tmp_path):
  """After fine-tuning, say: transformers copies its own code alone, and 5 leaves rope_theta out."""
  transformers = pytest.importorskip('transformers')
  prompts = tiny('llama', tmp_path / 'export')
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'export', trust_remote_code=True)
  model.save_pretrained(tmp_path / 'hf')
  tiny_tokenizer().save_pretrained(tmp_path / 'hf')
  (tmp_path / 'hf/mlx_adapt.py').write_bytes((tmp_path / 'export/mlx_adapt.py').read_bytes())
  check('mlx', tmp_path / 'hf', prompts, 2e-4)
