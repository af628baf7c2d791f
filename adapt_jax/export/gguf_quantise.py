"""K-quants of a .gguf file by llama.cpp's own quantiser, in a process of its own, which ends if it fails."""

import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from gguf import LlamaFileType

from adapt_jax.config.values import K_QUANTS
from adapt_jax.models.errors import InputError

_PACKAGE = 'llama_cpp_py_sync'
_PROGRAM = """
import sys
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
library, ffi = get_lib(), get_ffi()
options = ffi.new('llama_model_quantize_params *', library.llama_model_quantize_default_params())
path, out, options.ftype = sys.argv[1].encode(), sys.argv[2].encode(), int(sys.argv[3])
sys.exit(library.llama_model_quantize(path, out, options))
"""


def check_quantiser(kinds: Sequence[str]) -> None:
  """Raises InputError if one of these types needs llama.cpp and its package is not installed."""
  asked = [kind for kind in kinds if kind in K_QUANTS]
  if asked and importlib.util.find_spec(_PACKAGE) is None:
    raise InputError(
      f'export.gguf_types has {asked[0]!r}, which llama.cpp makes: install it with '
      f"pip install 'adapt-jax[quantise]', or leave the type out"
    )


def quantise(path: pathlib.Path, out: pathlib.Path, kind: str) -> None:
  """Writes `out`, of a type of `K_QUANTS`, from an unquantised file. Raises InputError if llama.cpp fails."""
  # -P: modules of the current directory are not imported.
  file_type = LlamaFileType[f'MOSTLY_{kind}']
  command = [sys.executable, '-P', '-c', _PROGRAM, str(path), str(out), str(int(file_type))]
  done = subprocess.run(command, capture_output=True, text=True, errors='replace')
  if done.returncode:
    reason = next(iter(done.stderr.strip().splitlines()[-1:]), f'code {done.returncode}')
    raise InputError(f'{out}: llama.cpp could not write type {kind} ({reason}): choose another')
