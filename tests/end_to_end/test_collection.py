"""The tests are collected where only the package itself is installed; those that need more are skipped."""

import subprocess
import sys

from tests.support import runs


def test_collection_needs_no_extra():
  command = [sys.executable, '-m', 'pytest', '-p', 'tests.support.without_extras', '--collect-only', '-q']
  done = subprocess.run([*command, '-p', 'no:cacheprovider'], cwd=runs.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr
