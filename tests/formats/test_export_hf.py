"""Exported Hugging Face directories in transformers: this one, and 4.57 where it is installed."""

import json
import pathlib
import subprocess
import sys
import unittest.mock

import numpy as np
import pytest

from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.formats.hf_weights import leaves
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import UNIFORM, logits, random_params, random_tokens, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures('code_cache')

OLD_TRANSFORMERS = pathlib.Path(sys.prefix) / 'transformers-4.57'
LOGITS = 'expected_logits.npy'
BY_HEAD = (LayerShape(4, 1, 24), LayerShape(1, 1, 40), LayerShape(3, 1, 24))  # pruned by query heads
# One pruned model of each family, and what stock classes have no option for: biases of o_proj and down_proj.
EXPORTS = {
  **{family: tiny_config(family, vocab_size=320) for family in FAMILIES},
  'gemma3_text-by-query-heads': tiny_config('gemma3_text', BY_HEAD, vocab_size=320),
  'phi3-by-query-heads': tiny_config('phi3', BY_HEAD, vocab_size=320),
  'llama-heads-that-divide': tiny_config('llama', BY_HEAD, vocab_size=320),
  'llama-all-biases': tiny_config('llama', vocab_size=320, qkv_bias=True, output_bias=True),
  'qwen2-output-bias': tiny_config('qwen2', vocab_size=320, output_bias=True),
  'llama-sliced': tiny_config('llama', vocab_size=320, hidden_size=30, sliced_from=48),
}
# With which all is done; with the others, what each family computes in its own way.
WHOLE = ('llama', 'llama-all-biases', 'qwen2-output-bias', 'gemma3_text-by-query-heads', 'llama-sliced')


def export(directory, config, **options):
  """Writes a random model and, beside its files, our own logits for it."""
  params = random_params(config)
  write_hf(config, params, directory, **options)
  np.save(directory / LOGITS, np.asarray(logits(config, params, random_tokens(config))))
  return params


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
  root = tmp_path_factory.mktemp('exports')
  for name, config in EXPORTS.items():
    export(root / name, config, tokenizer=tiny_tokenizer())
  return root


def load(directory, **options):
  return transformers.AutoModelForCausalLM.from_pretrained(
    directory, trust_remote_code=True, **options
  ).eval()


def check_logits(model, directory):
  expected = np.load(directory / LOGITS)
  tokens = torch.tensor(random_tokens(model.config))
  with torch.no_grad():
    found = model(tokens).logits.numpy()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def check_generation(model):
  prompt = torch.tensor(random_tokens(model.config, length=8))
  mask = torch.ones_like(prompt)

  def continuation(prompt, mask, **options):
    settings = {'max_new_tokens': 10, 'do_sample': False, 'eos_token_id': None, 'pad_token_id': 0}
    return model.generate(prompt, attention_mask=mask, **(settings | options))[:, prompt.shape[1] :]

  expected = continuation(prompt, mask, use_cache=False)
  assert torch.equal(continuation(prompt, mask), expected)
  assert torch.equal(continuation(prompt, mask, cache_implementation='static'), expected)
  alone = continuation(prompt[1:, 3:], mask[1:, 3:])
  prompt[1, :3] = mask[1, :3] = 0  # the batch's shorter row, filled up on the left
  assert torch.equal(continuation(prompt, mask), torch.cat([expected[:1], alone]))


def check_save(model, directory, out):
  model.save_pretrained(out)
  again = load(out).state_dict()
  assert again.keys() == model.state_dict().keys()
  for name, weight in model.state_dict().items():
    assert torch.equal(again[name], weight), name
  check_logits(load(out), directory)


def check_tokenizer(directory, trust):
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=trust)
  text = '<|im_start|>the quick brown fox<|im_end|>'
  assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
  # transformers 4 adds token_type_ids by itself, and then `generate(**tokens)` refuses them.
  assert sorted(tokenizer(text)) == ['attention_mask', 'input_ids']
  assert (tokenizer.bos_token, tokenizer.eos_token) == ('<s>', '</s>')
  assert 'assistant' in tokenizer.chat_template


def check_questions(directory):
  """A tokenizer asks nothing if the model has a stock type, and then no stock class takes the weights."""
  stock = not json.loads((directory / 'config.json').read_text())['model_type'].startswith('adapt_')
  with unittest.mock.patch('builtins.input', return_value='n') as asked:
    transformers.AutoTokenizer.from_pretrained(directory)
    assert not (asked.called and stock)
    with pytest.raises((RuntimeError, ValueError), match='size|remote_code'):
      transformers.AutoModelForCausalLM.from_pretrained(directory)
  return stock


def check_directory(directory, out):
  """All that transformers does with an export; `out` is a directory for what it saves."""
  model = load(directory)
  assert type(model).__name__.startswith('Adapt')
  assert model.config._attn_implementation == ('sdpa' if model._supports_sdpa else 'eager')
  check_logits(model, directory)
  check_questions(directory)
  check_logits(load(directory, attn_implementation='eager'), directory)
  read = [layer.self_attn.config for layer in model.model.layers]
  assert all(getattr(config, 'whole', config) is model.config for config in read)
  check_generation(model)
  if directory.name not in WHOLE:
    return
  check_save(model, directory, out)
  check_tokenizer(directory, trust=False)
  check_tokenizer(directory, trust=True)
  tokens = torch.tensor(random_tokens(model.config))
  bare = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True)
  assert torch.equal(bare(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


@pytest.mark.parametrize('name', EXPORTS)
def test_pruned_model_runs_in_transformers(name, exports, tmp_path):
  check_directory(exports / name, tmp_path)
  if name in WHOLE:
    assert open_source(str(tmp_path)).config == EXPORTS[name]


def test_pruned_models_run_in_transformers_4(exports, tmp_path):
  if not OLD_TRANSFORMERS.exists():
    pytest.skip(f'no {OLD_TRANSFORMERS.name} in the virtual environment: make test installs it there')
  for name in ('llama', 'llama-all-biases'):
    load(exports / name).save_pretrained(tmp_path / 'five' / name)
  root = pathlib.Path(__file__).parents[2]
  program = (
    'import pathlib, sys, transformers\n'
    'from tests.formats.test_export_hf import EXPORTS, check_directory, check_logits, load\n'
    'from tests.formats.test_export_hf_training import check_tools\n'
    'assert transformers.__version__.startswith("4.57."), transformers.__version__\n'
    # Trainer imports it where it is there; the one beside is for a newer huggingface_hub.
    'transformers.utils.import_utils._datasets_available = False\n'
    'exports, out = map(pathlib.Path, sys.argv[1:])\n'
    'for name in EXPORTS: check_directory(exports / name, out / name)\n'
    'check_tools(exports / "llama", out / "tools")\n'
    'for saved in (out / "five").iterdir(): check_logits(load(saved), exports / saved.name)\n'
  )
  environment = {
    'PATH': '',
    'PYTHONPATH': f'{OLD_TRANSFORMERS}:{root}',
    'HF_HOME': str(tmp_path / 'cache'),
    'HF_HUB_OFFLINE': '1',
    'OMP_NUM_THREADS': '1',
  }
  command = [sys.executable, '-c', program, str(exports), str(tmp_path)]
  done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  for name in WHOLE:
    assert open_source(str(tmp_path / name)).config == EXPORTS[name]
    check_logits(load(tmp_path / name), exports / name)


@pytest.mark.parametrize('name', EXPORTS)
def test_our_own_loader_reads_back_the_same_bits(name, tmp_path):
  config, dtype = EXPORTS[name], 'bfloat16'
  params = random_params(config, dtype=dtype)
  write_hf(config, params, tmp_path / 'hf')
  source = open_source(str(tmp_path / 'hf'))
  assert source.config == config and source.dtype == dtype
  loaded = source.load_params()
  for leaf in leaves(config):
    ours, theirs = params, loaded
    for key in leaf.path:
      ours, theirs = ours[key], theirs[key]
    assert np.asarray(theirs).tobytes() == ours.tobytes(), leaf.name


@pytest.mark.parametrize(
  'family, fields', [*((family, {}) for family in FAMILIES), ('llama', {'qkv_bias': True})]
)
def test_uniform_model_is_a_stock_one(family, fields, tmp_path):
  directory = tmp_path / 'hf'
  export(directory, tiny_config(family, UNIFORM, **fields))
  # MLX-LM's Qwen2 knows no head_dim of its own.
  assert [p.name for p in directory.glob('*.py')] == (['mlx_adapt.py'] if family == 'qwen2' else [])
  model = transformers.AutoModelForCausalLM.from_pretrained(directory)
  assert type(model).__module__.startswith('transformers.models.')
  assert not {'auto_map', 'per_layer_config'} & json.loads((directory / 'config.json').read_text()).keys()
  check_logits(model, directory)


def test_which_exports_open_their_tokenizer_without_a_question(exports):
  asking = {name for name in EXPORTS if not check_questions(exports / name)}
  # Their widest layer has 9 heads in a hidden size of 48, which their stock configurations refuse; or a stock
  # class may load them wrongly.
  assert asking == {'llama', 'gemma2', 'gemma3_text', 'llama-all-biases', 'llama-sliced'}


def test_heads_that_do_not_divide_the_hidden_size(tmp_path):
  """The stock Llama of transformers 5 refuses them, in a uniform model too."""
  config = tiny_config('llama', layers=(LayerShape(5, 5, 16),) * 2)
  export(tmp_path / 'hf', config)
  raw = json.loads((tmp_path / 'hf/config.json').read_text())
  assert raw['dtype'] == raw['torch_dtype'] == 'float32'  # each version looks elsewhere
  check_logits(load(tmp_path / 'hf'), tmp_path / 'hf')
  assert open_source(str(tmp_path / 'hf')).config == config


def test_only_widths_below_the_widest_are_listed(exports):
  raw = json.loads((exports / 'mistral/config.json').read_text())
  widest = ('num_attention_heads', 'num_key_value_heads', 'intermediate_size')
  assert [raw[k] for k in widest] == [9, 3, 64]
  assert 'logit_scale' not in raw
  granite = json.loads((exports / 'granite/config.json').read_text())  # vLLM scales its logits by this alone
  assert granite['logit_scale'] == 1 / granite['logits_scaling'] == 0.5
  assert raw['per_layer_config'] == {
    '0': {'num_attention_heads': 3, 'num_key_value_heads': 1, 'intermediate_size': 24},
    '1': {'num_attention_heads': 6, 'num_key_value_heads': 2, 'intermediate_size': 40},
    '2': {'num_attention_heads': 3, 'num_key_value_heads': 1},
    '3': {'intermediate_size': 48},
  }


def test_special_ids_come_from_the_tokenizer(exports, tmp_path):
  ids = {'bos_token_id': 0, 'eos_token_id': 1}
  raw = json.loads((exports / 'qwen2/config.json').read_text())
  assert {k: raw[k] for k in ids} == ids and raw['pad_token_id'] is None
  assert json.loads((exports / 'qwen2/generation_config.json').read_text()) == ids
  config, more = tiny_config(), {'eos_token_id': [1, 3], 'temperature': 0.6}
  write_hf(config, random_params(config), tmp_path / 'hf', tokenizer=tiny_tokenizer(), generation=more)
  assert json.loads((tmp_path / 'hf/generation_config.json').read_text()) == ids | more
