"""Where models come from: directories and hub ids."""

import errno
import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.numpy import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from adapt_jax.models.errors import InputError, unreachable
from adapt_jax.models.formats.source import _tokenizer_from_directory, open_source
from tests.formats.test_gguf_model import tiny_config, write_model
from tests.formats.test_gguf_vocab import DIGITS, published


@pytest.fixture(autouse=True)
def reachable(monkeypatch):
  """Whether this machine reaches the hub does not matter here."""
  monkeypatch.setattr('adapt_jax.models.formats.source._no_hub', lambda: False)


@pytest.fixture
def hub(files, monkeypatch):
  """A hub whose repositories all are the tiny model; returns the list of what was asked for."""
  asked = []

  def hf_hub_download(name, filename):
    asked.append((name, filename))
    return str(files / 'model' / filename)

  def snapshot_download(name, **patterns):
    asked.append((name, patterns))
    return str(files / 'model')

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  return asked


def test_hub_id_is_downloaded_as_weights_and_json_only(hub):
  source = open_source('some-org/some-model')
  (name, first), (again, patterns) = hub
  assert name == again == 'some-org/some-model' and first == 'config.json'
  assert len(source.load_tokenizer()) == source.config.vocab_size
  wanted = ['config.json', 'tokenizer.json', 'model-00001-of-00002.safetensors']
  unwanted = ['modeling.py', 'pytorch_model.bin', 'original/params.json', 'onnx/model.safetensors']
  unwanted += ['consolidated.safetensors', 'consolidated.00-of-02.safetensors']
  found = huggingface_hub.utils.filter_repo_objects(wanted + unwanted, **patterns)
  assert list(found) == wanted


def test_unsupported_model_of_the_hub_is_refused_before_its_weights(hub, monkeypatch, tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda name, filename: str(tmp_path / filename))
  with pytest.raises(InputError, match="some-org/some-model/config.json: model_type 'gpt2'"):
    open_source('some-org/some-model')
  assert not hub


@pytest.mark.parametrize('name', ['x' * 300, 'some\0name', '~nobody-of-that-name/model'])
def test_impossible_names_are_one_line(name):
  with pytest.raises(InputError):
    open_source(name)


def test_generation_fields_are_read_on_opening(files, tmp_path):
  path = tmp_path / 'model'
  shutil.copytree(files / 'model', path)
  (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [1, 2]}))
  assert open_source(str(path)).generation == {'eos_token_id': [1, 2]}
  for wrong in ({'eos_token_id': '2'}, {'repetition_penalty': 0}, {'top_p': 'high'}, {'name': '\ud800'}):
    (path / 'generation_config.json').write_text(json.dumps(wrong))
    with pytest.raises(InputError, match=r'generation_config\.json'):
      open_source(str(path))
  (path / 'generation_config.json').unlink()
  assert open_source(str(path)).generation == {}


@pytest.mark.parametrize(
  'named, special',
  [('GPT2Tokenizer', 'named'), ('Qwen2Tokenizer', 'of the class'), ('PreTrainedTokenizerFast', 'named')],
)
def test_a_byte_level_tokenizer_splits_as_its_file_says(files, tmp_path, named, special):
  """SmolLM2's names GPT2Tokenizer, which in transformers 5 does not split digits."""
  path, given = tmp_path / 'model', published(DIGITS)
  given.add_tokens(['<|endoftext|>'], special_tokens=True)
  shutil.copytree(files / 'model', path)
  given.save_pretrained(path)
  settings = json.loads((path / 'tokenizer_config.json').read_text())
  settings = settings if special == 'named' else {}
  (path / 'tokenizer_config.json').write_text(json.dumps(settings | {'tokenizer_class': named}))
  text = '\n\n2024 hello=  20<think>\n\n1'
  found = _tokenizer_from_directory(path)
  of_class = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
  assert found(text).input_ids == given(text).input_ids
  assert found.special_tokens_map == of_class.special_tokens_map
  assert found.special_tokens_map.items() >= given.special_tokens_map.items() or special != 'named'


def test_a_digest_tells_models_apart(files, tmp_path):
  def digest(name, change):
    path = tmp_path / name
    shutil.copytree(files / 'model', path)
    config, weights = path / 'config.json', path / 'model.safetensors'
    change(config, weights)
    return open_source(str(path)).model_digest()

  def other_config(config, _):
    config.write_text(json.dumps(json.loads(config.read_text()) | {'rms_norm_eps': 0.1}))

  def other_weights(_, weights):
    save_file({name: 2 * array for name, array in load_file(weights).items()}, weights)

  same = digest('copy', lambda *_: None)
  assert same == open_source(str(files / 'model')).model_digest()
  assert len({same, digest('config', other_config), digest('weights', other_weights)}) == 3


@pytest.mark.parametrize(
  ('cause', 'expected'),
  [
    (OSError(errno.ENETUNREACH, 'Network is unreachable'), True),
    (OfflineModeIsEnabled('HF_HUB_OFFLINE'), False),  # a ConnectionError
    (OSError(errno.ENOENT, 'no such file'), False),
  ],
)
def test_what_a_connection_has_caused(cause, expected):
  error = RuntimeError('of an HTTP library')
  error.__cause__ = cause
  assert unreachable(error) is expected


def test_a_tokenizer_model_alone_is_read(files, tmp_path):
  """As MobileLLM's checkpoints have it, without tokenizer.json."""
  words = files / 'train.txt'
  options = {'vocab_size': 300, 'model_type': 'bpe', 'byte_fallback': True, 'minloglevel': 2}
  SentencePieceTrainer.train(input=str(words), model_prefix=str(tmp_path / 'tokenizer'), **options)
  (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "LlamaTokenizer"}')
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  text = ' '.join(words.read_text().split()[:40])
  expected = SentencePieceProcessor(str(tmp_path / 'tokenizer.model')).encode(text)
  assert _tokenizer_from_directory(tmp_path)(text, add_special_tokens=False).input_ids == expected


def test_a_gguf_chat_model_ends_at_the_end_of_a_turn(tmp_path):
  """Gemma's files have another EOS, and not all name the end of a turn."""
  for name, added, expected in (
    ('named', lambda writer: writer.add_eot_token_id(3), {'eos_token_id': [0, 3]}),
    ('by text', lambda writer: None, {'eos_token_id': [0, 1]}),
    ('the same', lambda writer: writer.add_eot_token_id(0), {}),
    ('beyond the vocabulary', lambda writer: writer.add_eot_token_id(64), {'eos_token_id': [0, 1]}),
  ):
    tokens = ['<eos>', '<end_of_turn>', *map(str, range(62))]
    path = tmp_path / f'{name}.gguf'

    def extra(writer, added=added, tokens=tokens):
      writer.add_token_list(tokens)
      writer.add_eos_token_id(0)
      added(writer)

    write_model(path, tiny_config('llama'), extra=extra)
    assert open_source(str(path)).generation == expected
