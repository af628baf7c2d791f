"""Times models in turn, so that other load on the machine affects all of them."""

from collections.abc import Sequence

from adapt_jax.generation.generator import Generator, Timings
from adapt_jax.machine import preemption
from adapt_jax.machine.progress import Progress


def time_in_turn(
  generators: Sequence[Generator], prompts: list[list[int]], new_tokens: int, repeats: int, title: str
) -> list[list[Timings]]:
  """The timings of each model's runs, [models][repeats]; a round runs every model once. Raises `Preempted`.

  Programs that a model has not compiled before are compiled, and that time is not counted.
  """
  found: list[list[Timings]] = [[] for _ in generators]
  with Progress(title, repeats * len(generators), 'runs') as progress:
    for _ in range(repeats):
      for generator, timings in zip(generators, found, strict=True):
        preemption.check()
        generator.timings = Timings()
        generator.generate(prompts, new_tokens)
        timings.append(generator.timings)
        progress.update(1)
  return found
