"""Runs `main.py --mode=export` from SOURCE to OUT and times its parts. For benchmarks/export.py."""

import json
import sys
from collections.abc import Callable
from typing import Any

from adapt_jax import cli
from adapt_jax.export import writer
from adapt_jax.modes import export
from benchmarks.programs.export_usage import Peak, now, since

_found: dict[str, Any] = {}
_peak: list[Peak] = []


def _timed(owner: Any, name: str, part: str) -> None:
  """Makes a function record its time."""
  function: Callable[..., Any] = getattr(owner, name)

  def call(*args: Any, **options: Any) -> Any:
    if not _peak:  # nothing is read before the first call
      _peak.append(Peak())
    start = now()
    result = function(*args, **options)
    _found[part] = since(start)
    return result

  setattr(owner, name, call)


def run(source: str, out: str) -> None:
  _timed(export._Model, 'load', 'read')
  _timed(writer, 'write_hf', 'write')
  _timed(writer, 'check', 'check')
  sys.argv = ['main.py', '--config=configs/base.py', '--mode=export', f'--workdir={out}']
  sys.argv += [f'--config.model.source={source}', '--config.export.formats=hf']
  try:
    cli.run()
  except SystemExit as end:
    if end.code:
      raise
  print(json.dumps(_found | {'anonymous_bytes': _peak[0].bytes()}))


if __name__ == '__main__':
  run(*sys.argv[1:])
