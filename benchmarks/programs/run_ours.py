"""One export in adapt-jax: DIRECTORY PROMPTS.json OUT.json speed. For benchmarks/serving.py."""

import json
import pathlib
import sys

import jax.numpy as jnp

from adapt_jax.generation.generator import Generator, Timings
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.formats.source import open_source
from benchmarks.serving import logprobs


def main(directory: str, prompts: str, out: str, _: str) -> None:
  rows = json.loads(pathlib.Path(prompts).read_text())
  source = open_source(directory)
  params = source.load_params(jnp.float32)
  generator = Generator(source.config, params, compiler=Compiler(), dtype=jnp.float32, max_batch=1)
  rates = []
  for _ in range(4):  # the first compiles
    generator.timings = Timings()
    generator.generate(rows[:1], 33)
    rates.append(generator.timings.decode_rate)
  result = {'logprobs': logprobs(pathlib.Path(directory), rows).tolist(), 'tokens_per_second': max(rates[1:])}
  pathlib.Path(out).write_text(json.dumps(result))


if __name__ == '__main__':
  main(*sys.argv[1:])
