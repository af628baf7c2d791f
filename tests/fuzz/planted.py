"""Faults on purpose, so that a test sees that the fuzzer finds each kind of failure.

`python -m tests.fuzz.planted OUT` prints the outcome of each, as JSON, and keeps the failures in OUT.
"""

import json
import os
import pathlib
import random
import sys
import tempfile
import time

from adapt_jax.models.errors import InputError
from tests.fuzz import cases
from tests.fuzz.campaign import Campaign, again

_FAULTS = (
  'same', 'refused', 'harmless', 'crash', 'hang', 'memory', 'more memory', 'value', 'left', 'temporary',
  'changed', 'two lines', 'escape', 'nothing said', 'death',
)  # fmt: skip


class Planted(cases.Kind):
  """A file that says which fault reading it has."""

  name = 'planted'

  def make(self, place: pathlib.Path) -> None:
    (place / 'fault').write_text('none')

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    fault = rng.choice(_FAULTS)
    (place / 'fault').write_text(fault)
    return fault

  def observe(self, place: pathlib.Path) -> cases.Values:
    fault, value = (place / 'fault').read_text(), 'as it was'
    said = {'refused': 'no', 'two lines': 'a\nb', 'escape': '\x1b[31m', 'nothing said': ' '}
    if fault in said:
      error = InputError('')
      error.args = (said[fault],)  # as it is: the class itself escapes what is not printable
      raise error
    if fault == 'crash':
      raise KeyError('x')
    if fault == 'hang':
      time.sleep(600)
    elif fault == 'memory':
      bytearray(2**34)
    elif fault == 'more memory':
      value = value[: len(b'\1' * 2**28)]
    elif fault in ('value', 'harmless'):
      return {fault: 'other'}
    elif fault in ('left', 'changed'):
      (place / ('fault' if fault == 'changed' else 'new')).write_text('x')
    elif fault == 'temporary':
      tempfile.mkstemp()
    elif fault == 'death':
      os.abort()
    return {'value': value, 'harmless': value}

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    return {'value': 'as it was', 'harmless': 'other'}


class _Harmless(Planted):
  """Reading gives both values; one fault changes the one that may differ, the other that which may not."""

  def observe(self, place: pathlib.Path) -> cases.Values:
    return {'value': 'as it was', 'harmless': 'as it was'} | super().observe(place)


def main(out: pathlib.Path) -> None:
  """Runs faults until each was drawn, and repeats those that failed from what was kept."""
  cases.SECONDS, cases.GROWTH = 5, 2**26
  kind, found = _Harmless(), {}
  with tempfile.TemporaryDirectory() as room:
    campaign = Campaign({kind.name: kind}, 0, 4, pathlib.Path(room))
    campaign.prepare([kind.name])
    drawn = {random.Random(f'0/{kind.name}/{i}').choice(_FAULTS): i for i in range(300)}
    kept = []
    for outcome in campaign.run(iter([(kind.name, index) for index in drawn.values()])):
      found[outcome.done] = [outcome.result, outcome.detail]
      if outcome.result == 'failed':
        kept.append(campaign.keep(outcome, out))
    assert again(campaign, kept[:3]) == 1
  print(json.dumps(found))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
