"""What runs in one process on the same model share: programs, scores, and measurements of the dense model."""

import dataclasses
from typing import Any

from adapt_jax.machine.compiler import Programs
from adapt_jax.pruning.score_memo import ScoreMemo


@dataclasses.dataclass(frozen=True)
class Shared:
  """Programs, scores, and what the dense model measures, by the options that it depends on.

  dense: perplexities. tasks: scores of the harness.
  """

  programs: Programs = dataclasses.field(default_factory=Programs)
  scores: ScoreMemo = dataclasses.field(default_factory=ScoreMemo)
  dense: dict[Any, float] = dataclasses.field(default_factory=dict)
  tasks: dict[Any, Any] = dataclasses.field(default_factory=dict)
