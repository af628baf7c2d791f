"""Stages, tokens and training FLOPs of published recipes, from shapes. For benchmarks/compile_time.py.

python -m benchmarks.programs.recipe_arithmetic '{"mobilellm_350m_to_125m": {"layers": 32, ...}}'
"""

import json
import sys
from typing import Any

from adapt_jax.config.build import from_dict
from adapt_jax.configs import published
from adapt_jax.modes.estimate import stage_configs
from adapt_jax.pipeline import flops
from adapt_jax.pipeline.schedule import stage_steps
from benchmarks.programs.compile_stage import dense_config


def arithmetic(recipe: str, shape: dict[str, Any]) -> dict[str, float]:
  """Stages, tokens and FLOPs of all training; a stage has equal layers, since only their sum matters."""
  options = from_dict(published.get_config(recipe).to_dict())
  t, dense = options.train, dense_config(shape)
  ends = [0, *stage_steps(t, options.prune.stages)]
  stages = stage_configs(options, dense)
  tokens = [(b - a) * t.batch * t.length for a, b in zip(ends, ends[1:], strict=False)]
  costs = [flops.training(options, dense, flops.forward(config, t.length)) for config in stages]
  work = sum(n * cost for n, cost in zip(tokens, costs, strict=True))
  return {'stages': len(stages), 'tokens': sum(tokens), 'flops': work}


if __name__ == '__main__':
  print(json.dumps({name: arithmetic(name, shape) for name, shape in json.loads(sys.argv[1]).items()}))
