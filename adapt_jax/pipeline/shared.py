"""Caches shared by runs in one process on the same model: programs, scores, figures of the dense model."""

import dataclasses
from typing import Any, NamedTuple

from adapt_jax.evaluation.perplexity import Reference
from adapt_jax.machine.compiler import Programs
from adapt_jax.pruning.score_memo import ScoreMemo
from adapt_jax.training.healing import Told


class DenseReference(NamedTuple):
  """The dense model on each text, the reference of divergences, and its answers for `evaluation.health`."""

  texts: dict[str, Reference]
  answers: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Shared:
  """Programs, scores, and measurements of the dense model by the options that they depend on.

  told: what it says on the calibration rows, for healing. dense: perplexities by text. references: what
  models are compared with. tasks: scores of the harness.
  """

  programs: Programs = dataclasses.field(default_factory=Programs)
  scores: ScoreMemo = dataclasses.field(default_factory=ScoreMemo)
  told: dict[Any, Told] = dataclasses.field(default_factory=dict)
  dense: dict[Any, dict[str, float]] = dataclasses.field(default_factory=dict)
  references: dict[Any, DenseReference] = dataclasses.field(default_factory=dict)
  tasks: dict[Any, Any] = dataclasses.field(default_factory=dict)
