"""A plugin for pytest under which only what `pip install` of this project brings can be imported."""

import sys

# What tests import of the extras `eval`, `tensorboard`, `wandb` and `test`. PyYAML comes with flax.
ABSENT = ('torch', 'lm_eval', 'tensorboard', 'wandb', 'accelerate', 'llama_cpp_py_sync', 'llama_cpp')

for name in ABSENT:
  sys.modules[name] = None  # type: ignore[assignment]  # imports raise, find_spec finds nothing
