"""Rules that involve several options, or that a range cannot express."""

import math
import operator
import re
from collections.abc import Iterator

from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import OWN, serving_multiples
from adapt_jax.models.errors import InputError


def check(options: RunOptions) -> None:
  """Raises InputError naming field, value and remedy."""
  serving_multiples(options.prune.serve)
  for field, broken, remedy in _rules(options):
    if broken:
      raise InputError(f'{field} = {operator.attrgetter(field)(options)!r}: {remedy}')


def _rules(options: RunOptions) -> Iterator[tuple[str, bool, str]]:
  """Field, whether its value breaks the rule, and what to do."""
  prune, train, bases, push = options.prune, options.train, options.sensitivity.bases, options.export.push
  timed = any(target.timed for target in prune.limits)
  table = 'name the report.json of --mode=bench on the dense model, or a device such as h100'
  yield 'prune.target', timed and not prune.latency_table, f'it needs prune.latency_table: {table}'
  unread = 'it is only read for a prune.target in latency, ms or tok/s: give one, or leave the table empty'
  yield 'prune.latency_table', bool(prune.latency_table) and not timed, unread
  cached = any(target.kind == 'kv_cache' for target in prune.limits)
  heads = prune.attention == 'query_heads' and cached
  yield 'prune.attention', heads, 'a prune.target of kv counts KV heads: change one of them'
  for name in ('lr', 'min_lr'):
    below = -1 < getattr(train, name) < 0
    yield f'train.{name}', below, 'give a learning rate, or -1 for the default'
  yield 'train.min_lr', 0 <= train.lr < train.min_lr, f'it is above train.lr = {train.lr}: lower it'
  shares = 'give one number >= 0 for each entry of source, not all 0; or none, to concatenate the entries'
  for group in ('prune.calibration', 'train'):
    part = operator.attrgetter(group)(options)
    yield f'{group}.weights', not _are_shares(part.weights, part.source), shares
  sizes = {axis: getattr(options.mesh, axis) for axis in ('data', 'fsdp', 'tensor')}
  for axis, size in sizes.items():
    yield f'mesh.{axis}', size < 1 and size != -1, 'give a number of devices, or -1 for all that remain'
  yield 'mesh', [*sizes.values()].count(-1) > 1, 'only one axis may be -1'
  yield 'sensitivity.bases', not bases or len({*bases}) < len(bases), 'give one or more numbers, each once'
  yield 'evaluate.source', OWN in options.evaluate.texts, f'the name {OWN!r} is taken: choose another'
  if isinstance(prune.target, tuple):
    yield 'export.push', bool(push), 'prune.target has several sizes: upload one of them by --mode=export'
  named = re.fullmatch(r'[\w.-]+/[\w.-]+', push, re.ASCII)
  yield 'export.push', bool(push) and not named, 'give a repository of the hub, as org/name'


def _are_shares(weights: tuple[float, ...], source: tuple[str, ...]) -> bool:
  good = len(weights) == len(source) and all(0 <= x < math.inf for x in weights) and any(weights)
  return good or not weights
