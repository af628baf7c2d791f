"""Where models come from: directories and hub ids."""

import json
import shutil

import huggingface_hub
import pytest

from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from tests.support import runs


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return runs.make_files(tmp_path_factory.mktemp('files'))


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
  assert source.config.num_layers == 4 and len(source.load_tokenizer()) == source.config.vocab_size
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


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
  monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(InputError, match="some-org/some-model': no such directory, and the hub") as e:
    open_source('some-org/some-model')
  assert '\n' not in str(e.value)


def test_stored_dtype_is_known_before_loading(files):
  assert open_source(str(files / 'model')).dtype == 'float32'
  source = open_source(str(files / 'bfloat16'))
  assert source.dtype == 'bfloat16'
  assert source.load_params()['embed'].dtype == 'bfloat16'
  assert source.load_params('float32')['embed'].dtype == 'float32'


def test_errors_of_the_hub_without_a_message_are_one_line(monkeypatch):
  def hf_hub_download(name, filename):
    raise ConnectionError

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', hf_hub_download)
  with pytest.raises(InputError, match='the hub download failed .ConnectionError.'):
    open_source('some-org/some-model')


@pytest.mark.parametrize('name', ['x' * 300, 'some\0name', '~nobody-of-that-name/model'])
def test_impossible_names_are_one_line(name):
  with pytest.raises(InputError):
    open_source(name)


def test_generation_fields_are_read_on_opening(files, tmp_path):
  path = tmp_path / 'model'
  shutil.copytree(files / 'model', path)
  (path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [1, 2]}))
  assert open_source(str(path)).generation == {'eos_token_id': [1, 2]}
  (path / 'generation_config.json').unlink()
  assert open_source(str(path)).generation == {}


def test_broken_tokenizer_is_one_line(files, tmp_path):
  """The tokenizers library raises a bare Exception for it."""
  path = tmp_path / 'model'
  shutil.copytree(files / 'model', path)
  raw = json.loads((path / 'tokenizer.json').read_text())
  (path / 'tokenizer.json').write_text(json.dumps(raw | {'model': {}}))
  with pytest.raises(InputError, match='model: the tokenizer cannot be loaded') as refusal:
    open_source(str(path)).load_tokenizer()
  assert '\n' not in str(refusal.value)
