"""The identity of a run: its mode, and the options that its result depends on."""

from collections.abc import Sequence
from typing import Any

from adapt_jax.config.build import declarations, get
from adapt_jax.config.options import RunOptions

_REQUEST = ('bench.batch', 'bench.prompt_length', 'bench.new_tokens')  # of prune.budget
_PRUNE = ('seed', 'model', 'data', 'prune', 'evaluate', 'export', *_REQUEST)
# Groups and fields that each mode with a workdir reads. In a group, only options that the result depends on
# (`Declaration.result`) count; a field that is named individually always counts. A grid may grow, and its
# plots may change, since each of its cells is a run with its own identity.
_READS = {
  'accel': (*_PRUNE, 'train'),
  'prune': _PRUNE,
  'compare': (*_PRUNE, 'train', 'compare.recover'),
  'evaluate': ('model', 'data', 'evaluate'),
  'export': (
    'model.source', 'data.chat_template', 'export.dtype', 'export.formats', 'export.gguf_types'
  ),
  'sensitivity': (
    'seed', 'model', 'data', 'prune.method', 'prune.importance', 'prune.layer_distance', 'prune.align_ffn',
    'prune.compat', 'prune.calibration', 'evaluate.source', 'evaluate.length', 'evaluate.max_tokens',
    'sensitivity',
  ),
  'bench': ('seed', 'model', 'bench', 'prune.attention'),
}  # fmt: skip

# What a mode reads in addition; for modes without a workdir, everything.
_BESIDE = {
  **dict.fromkeys(('accel', 'prune'), ('mesh', 'tracker')),
  'evaluate': ('mesh',),
  'export': ('export.push', 'mesh'),
  'bench': ('mesh',),
  'sensitivity': ('evaluate.batch', 'prune.serve'),
  'compare': ('compare', 'mesh', 'tracker'),
  'generate': ('seed', 'model', 'data.chat_template', 'generate', 'mesh'),
  'estimate': (
    'model',
    'prune',
    'train',
    'estimate',
    'mesh',
    'export.dtype',
    *_REQUEST,
  ),
}


def identity(mode: str, options: RunOptions) -> dict[str, Any]:
  """{'mode': …, 'config': groups of options}, as in `run.json`."""
  reads = _READS[mode]
  if mode == 'compare' and not options.compare.recover:  # cells are only pruned
    reads = tuple(name for name in reads if name != 'train')
  return {'mode': mode, 'config': settings(options, reads)}


def reads(mode: str, field: str) -> bool:
  """Whether a mode reads an option such as 'prune.target', even if its result does not depend on it."""
  named = (*_READS.get(mode, ()), *_BESIDE.get(mode, ()))
  return any(field == name or field.startswith(f'{name}.') for name in named)


def settings(options: RunOptions, reads: Sequence[str] = _READS['accel']) -> dict[str, Any]:
  """The options of these groups that a result depends on, and these fields: {'prune': {'target': 0.8}}."""
  groups = tuple(f'{name}.' for name in reads)
  found: dict[str, Any] = {}
  for field, declared in declarations():
    if field in reads or (declared.result and field.startswith(groups)):
      *parents, last = field.split('.')
      node = found
      for name in parents:
        node = node.setdefault(name, {})
      value = get(options, field)
      node[last] = list(value) if isinstance(value, tuple) else value
  return found
