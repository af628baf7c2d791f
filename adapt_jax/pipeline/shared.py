"""Caches shared by runs in one process on the same model: programs, scores, figures of the dense model."""

import dataclasses
from typing import Any

from adapt_jax.evaluation.perplexity import Reference
from adapt_jax.machine.compiler import Programs
from adapt_jax.pruning.score_memo import ScoreMemo


@dataclasses.dataclass(frozen=True)
class Shared:
  """Programs, scores, and measurements of the dense model by the options that they depend on.

  dense: perplexities by text. references: the reference of divergences on each text. tasks: scores of the
    harness.
  """

  programs: Programs = dataclasses.field(default_factory=Programs)
  scores: ScoreMemo = dataclasses.field(default_factory=ScoreMemo)
  dense: dict[Any, dict[str, float]] = dataclasses.field(default_factory=dict)
  references: dict[Any, dict[str, Reference]] = dataclasses.field(default_factory=dict)
  tasks: dict[Any, Any] = dataclasses.field(default_factory=dict)
