"""Runs programs in turn (A B A B ...), each in a new process; medians, ranges, ratios; writes RESULTS.md.

It imports only the standard library: a process inherits its parent's peak memory, which must be small.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks/RESULTS.md'
# Of every program: one thread per core.
THREADS = str(os.cpu_count())
ENVIRONMENT = {  # compiling counts, so that no program is taken from a cache
  'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore', 'JAX_ENABLE_COMPILATION_CACHE': 'false',
}  # fmt: skip
_PACKAGES = {'jax': 'JAX', 'torch': 'PyTorch', 'transformers': 'transformers'}


@dataclasses.dataclass(frozen=True)
class Run:
  """One process: wall and CPU seconds, peak resident bytes, the JSON object of its last line of output."""

  seconds: float
  cpu_seconds: float
  peak_bytes: int
  answer: dict[str, Any]


def run(command: list[str]) -> Run:
  """Runs a program to its end; raises SystemExit with its last output if it fails."""
  fixed = ENVIRONMENT | {'OMP_NUM_THREADS': THREADS}
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | fixed, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    text, errors = (_text(file) for file in (out, err))
  if process.returncode:
    raise SystemExit(f'{" ".join(command)}: code {process.returncode}\n{text[-1000:]}\n{errors[-3000:]}')
  last = text.strip().splitlines()[-1] if text.strip() else ''
  answer = json.loads(last) if last.startswith('{') else {}
  scale = 1 if sys.platform == 'darwin' else 1024
  return Run(seconds, usage.ru_utime + usage.ru_stime, scale * usage.ru_maxrss, answer)


def _text(file: Any) -> str:
  file.seek(0)
  return str(file.read().decode(errors='replace'))


def in_turn(commands: dict[str, list[str]], rounds: int) -> dict[str, list[Run]]:
  """Runs each command once per round, in order; prints a line for each on stderr."""
  runs: dict[str, list[Run]] = {name: [] for name in commands}
  for i in range(rounds):
    for name, command in commands.items():
      runs[name].append(found := run(command))
      print(
        f'round {i + 1}/{rounds} {name}: {found.seconds:.1f} s, {found.cpu_seconds:.1f} CPU s, '
        f'{found.peak_bytes / 1e9:.2f} GB {json.dumps(found.answer)[:300]}',
        file=sys.stderr,
        flush=True,
      )
  return runs


def spread(values: list[float], digits: int = 2) -> str:
  """Median (lowest–highest), or the only value."""
  if len(values) == 1:
    return f'{values[0]:,.{digits}f}'
  return f'{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})'


def ratio(over: list[float], under: list[float], digits: int = 2) -> str:
  """Ratio of runs in the same round: median (lowest–highest)."""
  return spread([a / b for a, b in zip(over, under, strict=True)], digits)


def parser(doc: str | None, rounds: int = 0) -> argparse.ArgumentParser:
  """A parser with --write, and with --rounds if a default is given."""
  made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  if rounds:
    made.add_argument('--rounds', type=int, default=rounds, help='times that each program runs')
  made.add_argument('--write', action='store_true', help='replace this section of benchmarks/RESULTS.md')
  return made


def machine() -> str:
  """Processor, cores and memory."""
  name = platform.processor() or platform.machine()
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    text = info.read_text()
    if found := re.search(r'model name\s*: (.+)', text):
      name = found[1]
    name += ' with AMX' if 'amx_bf16' in text else ' with AVX-512 BF16' if 'avx512_bf16' in text else ''
  gigabytes = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
  return f'{os.cpu_count()} cores of {name}, {gigabytes:.0f} GB'


def versions() -> str:
  found = [f'Python {platform.python_version()}']
  for package, title in _PACKAGES.items():
    try:
      found.append(f'{title} {importlib.metadata.version(package)}')
    except importlib.metadata.PackageNotFoundError:
      continue
  return ', '.join(found)


def report(title: str, text: str, write: bool, quiet: bool = False) -> None:
  """Prints a section with machine, versions, date and command unless `quiet`; `write`: to RESULTS.md."""
  arguments = ' '.join(a for a in sys.argv[1:] if a != '--write')
  module = pathlib.Path(sys.argv[0]).stem
  command = f'python -m benchmarks.{module} {arguments}'.strip()
  day = datetime.date.today().isoformat()
  section = f'## {title}\n\n`{command}` on {machine()}; {versions()}; {day}.\n\n{text.strip()}\n'
  if not quiet:
    print(section)
  if write:
    replaced = replace_section(RESULTS.read_text(encoding='utf-8'), title, section)
    beside = RESULTS.with_suffix('.part')
    beside.write_text(replaced, encoding='utf-8')
    beside.replace(RESULTS)


def replace_section(document: str, title: str, section: str) -> str:
  """The document with its section of that title replaced, or added at its end."""
  pattern = re.compile(rf'^## {re.escape(title)}\n.*?(?=^## |\Z)', re.MULTILINE | re.DOTALL)
  if pattern.search(document):
    return pattern.sub(lambda _: section + '\n', document).rstrip() + '\n'
  return f'{document.rstrip()}\n\n{section}'
