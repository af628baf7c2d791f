"""The options that a result depends on, which tell one run from another."""

from collections.abc import Sequence
from typing import Any

from adapt_jax.config.build import declarations, get
from adapt_jax.config.options import RunOptions

REQUEST = ('bench.batch', 'bench.prompt_length', 'bench.new_tokens')  # of prune.target
_HEALING = ('train.dtype', 'train.moments_dtype')
PRUNING = ('seed', 'model', 'data', 'prune', 'evaluate', 'export', *_HEALING, *REQUEST)
TRAINING = (*PRUNING, 'train')
RECOVERY = ('seed', 'model', 'data', 'train', 'evaluate', 'export')
RUNS = ('accel', 'prune', 'recover')  # the modes that train or prune in a workdir
WRITTEN = ('export.dtype', 'export.formats', 'export.gguf_types')


def names(wanted: Sequence[str], field: str) -> bool:
  """Whether these fields and groups include a field such as 'prune.target'."""
  return any(field == name or field.startswith(f'{name}.') for name in wanted)


def settings(options: RunOptions, wanted: Sequence[str] = TRAINING) -> dict[str, Any]:
  """The options of these groups that a result depends on, and these fields: {'prune': {'target': 0.8}}."""
  chosen: dict[str, Any] = {}
  for field, declared in declarations():
    if field in wanted or (declared.result and names(wanted, field)):
      *parents, last = field.split('.')
      node = chosen
      for name in parents:
        node = node.setdefault(name, {})
      value = get(options, field)
      node[last] = list(value) if isinstance(value, tuple) else value
  return chosen
