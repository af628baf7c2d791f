"""adapt-jax: a pretrained LLaMA-family model into a smaller one that keeps its quality, on JAX.

    import adapt_jax as aj

    model = aj.load('HuggingFaceTB/SmolLM2-135M-Instruct')
    rows = aj.rows(model, 'calibration.txt')
    small, plan = aj.prune(model, rows, target=0.75)
    small = aj.recover(small, 'corpus.jsonl', tokens=2_000_000, teacher=model)
    aj.save(small, 'out', formats=('hf', 'gguf'))

What there is, is in `adapt_jax.api`; the command line is `adapt-jax`.
"""

import importlib
from typing import Any

__all__ = (
  'InputError', 'Model', 'generate', 'load', 'narrow', 'perplexity', 'prune', 'recover', 'rows', 'save',
  'trim_vocabulary',
)  # fmt: skip


def __getattr__(name: str) -> Any:
  """The library, loaded at its first use: what needs only Python, such as fetching the demo, does without."""
  if name == '__version__':
    return importlib.import_module('importlib.metadata').version('adapt-jax')
  if name in __all__:
    return getattr(importlib.import_module('adapt_jax.api'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted((*globals(), *__all__, '__version__'))
