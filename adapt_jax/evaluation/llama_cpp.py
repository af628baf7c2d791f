"""Quality and speed of .gguf files in the real llama.cpp, which the extra quantise installs."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adapt_jax.data.windows import Blocks
from adapt_jax.models.errors import InputError

DISTRIBUTION = 'llama-cpp-py-sync'
_PACKAGE = 'llama_cpp_py_sync'
_CHILD = pathlib.Path(__file__).with_name('llama_cpp_child.py')


def check_installed() -> None:
  """Raises InputError if the package with llama.cpp is not installed."""
  if importlib.util.find_spec(_PACKAGE) is None:
    raise InputError("--mode=frontier runs llama.cpp: install it with pip install 'adapt-jax[quantise]'")


def threads_here() -> int:
  """The CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def save_windows(path: pathlib.Path, texts: Sequence[Blocks]) -> None:
  """Writes the windows of all texts for `quality`."""
  named = {f'tokens{i}': blocks.tokens for i, blocks in enumerate(texts)}
  np.savez(path, allow_pickle=False, **named, **{f'targets{i}': b.targets for i, b in enumerate(texts)})


def quality(
  file: pathlib.Path,
  windows: pathlib.Path,
  reference: pathlib.Path,
  *,
  writes: bool,
  threads: int,
  advance: Callable[[], None],
) -> list[dict[str, float]]:
  """On each text the mean next-token `loss` and `kl`, KL(reference ‖ model), in nats per counted token.

  Args:
    windows: of `save_windows`. Ids are given, so the file's tokenizer does not matter.
    reference: log probabilities of the reference at every counted token, float16 [tokens, V].
    writes: whether this model is the reference; it writes the file, and its `kl` is 0.
    advance: called after each window.

  Raises InputError if llama.cpp cannot run the file, or if a figure is not finite.
  """
  job = {'windows': str(windows), 'reference': str(reference), 'writes': writes}
  found: list[dict[str, float]] = _ask(file, job | {'threads': threads}, advance)['texts']
  if not np.isfinite([x for text in found for x in text.values()]).all():
    raise InputError(f'{file}: in llama.cpp its loss is not finite: leave the type out of frontier.types')
  return found


def speed(file: pathlib.Path, *, threads: int, prompt_length: int, new_tokens: int, seed: int) -> list[float]:
  """Tokens per second of prefill and decode, of one prompt of random ids. Raises InputError."""
  job = {'threads': threads, 'prompt_length': prompt_length, 'new_tokens': new_tokens, 'seed': seed}
  found = _ask(file, job, lambda: None)
  return [found['prefill'], found['decode']]


def _ask(file: pathlib.Path, job: dict[str, Any], advance: Callable[[], None]) -> dict[str, Any]:
  with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile('w+', errors='replace') as log:
    asked, out = pathlib.Path(directory, 'job.json'), pathlib.Path(directory, 'out.json')
    asked.write_text(json.dumps({'file': str(file)} | job), encoding='utf-8')
    # -P: modules of the current directory are not imported.
    command = [sys.executable, '-P', str(_CHILD), str(asked), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child:
      try:
        assert child.stdout is not None
        for _ in child.stdout:
          advance()
      except BaseException:  # SIGTERM or Ctrl-C
        child.kill()
        raise
    if child.returncode:
      log.seek(0)
      reason = next(iter(log.read().strip().splitlines()[-1:]), f'code {child.returncode}')
      raise InputError(f'{file}: llama.cpp failed ({reason}): leave the model or the type out')
    found: dict[str, Any] = json.loads(out.read_text(encoding='utf-8'))
  return found
