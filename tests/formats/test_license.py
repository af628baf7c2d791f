"""The license of a source goes with the model into the cards of its exports."""

import huggingface_hub
import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.models.formats.license import license_of_gguf
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import export as export_mode
from adapt_jax.pipeline.workdir import Workdir
from tests.support import runs

LICENSE = {'license': 'other', 'license_name': 'llama3.2', 'license_link': 'https://example.org/license'}
CARD = '---\nlanguage: [en]\n' + ''.join(f'{k}: {v}\n' for k, v in LICENSE.items()) + '---\n# Title\n'


@pytest.fixture
def files(tmp_path):
  made = runs.make_files(tmp_path)
  (made / 'model/README.md').write_text(CARD)
  return made


def card_of(directory):
  fields = huggingface_hub.ModelCard.load(directory / 'README.md').data.to_dict()
  return {k: v for k, v in fields.items() if k.startswith('license')}


def test_exports_of_exports_keep_it(files, tmp_path):
  config = runs.make_config(files)
  config.export.formats = ('hf', 'gguf')
  export_mode.run(from_dict(config.to_dict()), Workdir(str(tmp_path / 'a'), {}), 'the command')
  assert card_of(tmp_path / 'a/hf') == card_of(tmp_path / 'a/gguf') == LICENSE
  (tmp_path / 'a/hf/README.md').unlink()  # the lineage has it too
  aj.save(aj.load(tmp_path / 'a/hf'), tmp_path / 'b')
  aj.save(aj.load(files / 'model'), tmp_path / 'c')
  assert card_of(tmp_path / 'b/hf') == card_of(tmp_path / 'c/hf') == LICENSE


def test_a_gguf_file_has_it_in_its_header():
  metadata = {'general.license': 'apache-2.0', 'general.license.name': 5, 'general.name': 'a'}
  assert license_of_gguf(metadata) == {'license': 'apache-2.0'}


@pytest.mark.parametrize(
  'card',
  [b'# Title', b'---\n: [\n---\n', b'---\nlicense: "a\\nb"\n---\n', b'\xff\xfe'],
)
def test_a_card_without_one_does_not_stop_a_model(files, card):
  (files / 'model/README.md').write_bytes(card)
  assert open_source(str(files / 'model')).license == {}
