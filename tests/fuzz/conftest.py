"""A handful of fixed examples in `make test`; many random ones in `make fuzz`, which sets FUZZ_CASES."""

import os

from hypothesis import HealthCheck, settings

_CASES = os.environ.get('FUZZ_CASES')
_CHECKS = list(HealthCheck)
settings.register_profile(
  'fuzz', max_examples=int(_CASES or 10), derandomize=not _CASES, deadline=None, database=None,
  suppress_health_check=_CHECKS,
)  # fmt: skip
settings.load_profile('fuzz')
