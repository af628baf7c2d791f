"""Models with a trimmed vocabulary: predictions on the condition of the kept tokens, in every export."""

import json

import numpy as np
import pytest

import adapt_jax as aj
from adapt_jax.export.hf import write_hf
from adapt_jax.models.formats.trimmed_tokenizer import trimmed_generation
from tests.formats.test_trimmed_tokenizer import PAGES, byte_level, converted
from tests.support.helpers import logits, random_params, refused, tiny_config
from tests.support.llama_cpp import Job, ask, needs_llama_cpp

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
TEXT = PAGES[0][:2000]
MODELS = {'byte level, tied': (byte_level, True), 'SentencePiece, a head': (converted, False)}
PADDING = 7  # rows of the embedding without a token


class Case:
  """A model, the same with the tokens of TEXT, and its exports."""

  def __init__(self, name, root):
    make, tied = MODELS[name]
    tokenizer = make()
    rows = len(tokenizer) + PADDING
    self.config = tiny_config('llama', vocab_size=rows, tie_embeddings=tied, max_position=4096)
    self.params = random_params(self.config)
    self.tokenizer, end = tokenizer, tokenizer.convert_tokens_to_ids('</s>')
    generation = {'eos_token_id': [end, rows - 1], 'top_k': 3}
    write_hf(self.config, self.params, root / 'model', tokenizer=tokenizer, generation=generation)
    (root / 'text.txt').write_text(TEXT)
    self.whole = aj.load(root / 'model')
    self.trimmed = aj.trim_vocabulary(self.whole, root / 'text.txt')
    aj.save(self.trimmed, root / 'out', formats=('hf', 'hf_padded', 'gguf'))
    self.out = root / 'out'
    self.ids = self.trimmed.tokenizer(TEXT)['input_ids'][:48]
    self.before = tokenizer(TEXT)['input_ids'][:48]
    tokens = self.trimmed.tokenizer.convert_ids_to_tokens(range(len(self.trimmed.tokenizer)))
    self.kept = tokenizer.convert_tokens_to_ids(tokens)

  @property
  def expected(self):
    """Logits [T, V] of the original at the kept ids."""
    found = logits(self.config, self.params, np.array([self.before]))
    return np.asarray(found)[0][:, self.kept]


@pytest.fixture(scope='module', params=MODELS)
def case(request, tmp_path_factory):
  return Case(request.param, tmp_path_factory.mktemp('case'))


def test_it_predicts_the_kept_tokens_as_before(case):
  found = logits(case.trimmed.config, case.trimmed.params, np.array([case.ids]))[0]
  np.testing.assert_allclose(found, case.expected, atol=2e-5)
  assert case.trimmed.config.vocab_size == len(case.trimmed.tokenizer) < len(case.tokenizer)
  rows = case.config.vocab_size - case.trimmed.config.vocab_size
  tables = 1 if case.config.tie_embeddings else 2
  assert case.whole.num_params - case.trimmed.num_params == rows * case.config.hidden_size * tables
  assert case.trimmed.dense == case.whole.num_params


def test_end_tokens_have_their_new_ids(case):
  end = case.trimmed.tokenizer.convert_tokens_to_ids('</s>')
  assert case.trimmed.generation.items() >= {'eos_token_id': [end], 'pad_token_id': end, 'top_k': 3}.items()
  for form in ('hf', 'hf_padded'):
    config, generation = (
      json.loads((case.out / form / f'{name}.json').read_text()) for name in ('config', 'generation_config')
    )
    assert config['eos_token_id'] == end and config['vocab_size'] == len(case.kept)
    assert config['bos_token_id'] == case.trimmed.tokenizer.convert_tokens_to_ids('<s>')
    assert generation['eos_token_id'] == [end] and generation['top_k'] == 3


@needs_llama_cpp
def test_llama_cpp_gives_the_same_tokens_and_predictions(case):
  texts = [TEXT, 'Many words here were never seen: qwertz.']
  job = Job(case.out / 'gguf/model-F32.gguf', texts, [case.ids])
  found = ask({'it': job})['it']
  assert found.ids == case.trimmed.tokenizer(texts)['input_ids']
  np.testing.assert_allclose(found.logits[0], case.expected, atol=1e-3)


def test_an_added_token_beyond_the_embedding_stays_beyond(tmp_path):
  """As Gemma 3's image token. A text that contains it is refused, as by the whole model."""
  tokenizer = byte_level()
  rows = len(tokenizer)
  tokenizer.add_special_tokens({'additional_special_tokens': ['<image>']})
  config = tiny_config('llama', vocab_size=rows)
  write_hf(config, random_params(config), tmp_path / 'model', tokenizer=tokenizer)
  (tmp_path / 'text.txt').write_text(TEXT)
  found = aj.trim_vocabulary(aj.load(tmp_path / 'model'), tmp_path / 'text.txt')
  assert found.config.vocab_size == len(found.params['embed']) < rows
  assert found.tokenizer.convert_tokens_to_ids('<image>') == found.config.vocab_size
  aj.save(found, tmp_path / 'out', formats=('hf', 'gguf'))
  again = aj.load(tmp_path / 'out/hf')
  assert again.tokenizer.get_vocab() == found.tokenizer.get_vocab()
  (tmp_path / 'image.txt').write_text(TEXT + '<image>' + TEXT)
  assert 'has only' in refused(aj.perplexity, again, tmp_path / 'image.txt', length=16)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
  tokenizer = byte_level()
  config = tiny_config('llama', vocab_size=len(tokenizer) // 2)
  model = aj.Model(config, random_params(config), tokenizer)
  (tmp_path / 'text.txt').write_text(TEXT)
  message = refused(aj.trim_vocabulary, model, tmp_path / 'text.txt')
  assert f'the embedding only {config.vocab_size} rows' in message


def test_ids_of_ordinary_tokens_in_generation_config_are_refused():
  message = refused(trimmed_generation, {'suppress_tokens': [3]}, [0, 1])
  assert 'generation_config.json has suppress_tokens' in message and 'remove it' in message
  assert trimmed_generation({'pad_token_id': 9, 'bos_token_id': 4}, [4, 2]) == {
    'pad_token_id': None,
    'bos_token_id': 0,
  }
