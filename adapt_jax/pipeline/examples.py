"""Examples for the report: how the dense model and the result continue the same held-out text."""

from typing import Any

from adapt_jax.config.values import OWN
from adapt_jax.generation.generator import Generator
from adapt_jax.generation.sampling import stop_ids
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.llama import Params
from adapt_jax.pipeline.inputs import Inputs
from adapt_jax.reports.report import ExampleReport

_PROMPT, _NEW = 32, 48  # tokens


class Examples:
  """The beginning of a window in the middle of each text, and what models write after it.

  Args:
    inputs: the inputs of the run; the dense model's end tokens end a text.
    compiler: counts compiles as `prefill` and `decode`.
    dtype: dtype of activations and products.
  """

  def __init__(self, inputs: Inputs, *, compiler: Compiler, dtype: Any):
    room = inputs.config.max_position
    texts = {name: blocks.tokens for name, blocks in inputs.evaluate.items() if name != OWN}
    windows = {name: tokens[len(tokens) // 2] for name, tokens in texts.items()}
    self._prompts = {name: window[: min(_PROMPT, room // 2)].tolist() for name, window in windows.items()}
    self._new = min(_NEW, room - room // 2)
    self._stop, self._tokenizer = stop_ids(inputs.source.generation, inputs.tokenizer), inputs.tokenizer
    self._compiler, self._dtype = compiler, dtype

  def continuations(self, config: ModelConfig, params: Params, title: str) -> list[str]:
    """The most likely continuation of each text by a model."""
    prompts = list(self._prompts.values())
    generator = Generator(config, params, compiler=self._compiler, dtype=self._dtype)
    with Progress(title, len(prompts) * self._new, 'tokens') as progress:
      new = generator.generate(prompts, self._new, stop_ids=self._stop, progress=progress)
    return [self._decode(ids) for ids in new]

  def report(self, dense: list[str], result: list[str]) -> list[ExampleReport]:
    """The texts side by side, with what both models wrote."""
    return [
      {'text': name, 'prompt': self._decode(ids), 'dense': before, 'result': after}
      for (name, ids), before, after in zip(self._prompts.items(), dense, result, strict=True)
    ]

  def _decode(self, ids: list[int]) -> str:
    text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
    return text
