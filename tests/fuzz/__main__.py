"""Runs the fuzzer: `python -m tests.fuzz --cases=10000`; `python -m tests.fuzz out/fuzz/…` repeats a case."""

import sys

from tests.fuzz.campaign import main

sys.exit(main(sys.argv[1:]))
