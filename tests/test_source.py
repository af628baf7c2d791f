"""Where models come from: directories and hub ids."""

import pytest
import runs

from models.errors import InputError
from models.source import open_source


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return runs.make_files(tmp_path_factory.mktemp('files'))


def test_hub_id_is_downloaded_as_weights_and_json_only(files, monkeypatch):
  huggingface_hub = pytest.importorskip('huggingface_hub')
  asked = {}

  def snapshot_download(name, allow_patterns):
    asked['name'], asked['patterns'] = name, allow_patterns
    return str(files / 'model')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  source = open_source('some-org/some-model')
  assert asked['name'] == 'some-org/some-model' and source.config.num_layers == 4
  assert not [p for p in asked['patterns'] if p.endswith(('.py', '.bin', '.pt'))]
  assert len(source.load_tokenizer()) == source.config.vocab_size


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
