"""Exports in the real vLLM, MLX-LM and LLM Compressor, each in its own environment: make test-serving."""

import json
import os
import pathlib
import re
import subprocess

import jax
import numpy as np
import pytest
import safetensors

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
  command = [python, ROOT / f'tests/support/serving/{program}_program.py', directory, asked, answer]
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


# The second layer is narrow; 128 is the group of weights that share a scale.
IN_GROUPS = (LayerShape(4, 2, 256), LayerShape(2, 1, 128))


def quantise(tmp_path, layers, *more):
  """Runs the example on a tiny export; returns its exit code, stdout and stderr."""
  python = ROOT / '.venv-serving/llmcompressor/bin/python'
  if not python.exists():
    pytest.skip('LLM Compressor is not installed: make test-serving does it')
  config = tiny_config('llama', layers, vocab_size=320, head_dim=64, hidden_size=128)
  write_hf(config, random_params(config), tmp_path / 'hf', tokenizer=tiny_tokenizer())
  text = tmp_path / 'text.txt'
  text.write_text('It was the best of times, it was the worst of times. The lazy dog sleeps. ' * 200)
  command = [python, ROOT / 'examples/quantise_4bit.py', tmp_path / 'hf', tmp_path / 'out', f'--text={text}']
  options = ['--samples=8', '--length=64', '--trust-remote-code', *more]
  done = subprocess.run([str(x) for x in command] + options, capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


def test_4_bits_of_layers_of_different_widths(tmp_path):
  """Written, read back by transformers, and nearly as good; matrices take a quarter of 16 bits."""
  code, out, err = quantise(tmp_path, IN_GROUPS, f'--held-out={tmp_path / "text.txt"}')
  assert code == 0, err[-3000:]
  assert '4 bits in groups of 128' in out
  before, after = map(float, re.search(r'([\d.]+) before, ([\d.]+) after', out).groups())
  assert 0.8 < after / before < 1.25 and after != before
  with safetensors.safe_open(tmp_path / 'out/model.safetensors', 'np') as file:
    packed = file.get_tensor('model.layers.1.mlp.down_proj.weight_packed')
  assert packed.nbytes == 128 * 128 // 2


def test_rows_that_no_group_divides_are_refused(tmp_path):
  code, _, err = quantise(tmp_path, (LayerShape(4, 2, 250), LayerShape(2, 1, 128)))
  assert code == 2 and err.splitlines()[-1] == (
    'error: model.layers.0.mlp.down_proj has 250 inputs, no multiple of 32: prune.serve=awq aligns MLPs'
  )
  assert not (tmp_path / 'out').exists()
