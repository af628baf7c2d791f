"""Whether a model still answers: greedy answers to plain questions, and the share that repeats itself."""

import importlib.resources
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from adapt_jax.config.values import OWN
from adapt_jax.data.tokenise import encode_prompts
from adapt_jax.data.windows import Blocks
from adapt_jax.generation.generator import Generator
from adapt_jax.generation.sampling import stop_ids
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.network.llama import Params
from adapt_jax.reports.report import ExampleReport, HealthReport, RatesReport

QUESTION = 'question'  # the name of such an example
_NEW, _BEGINNING = 96, 8  # tokens of an answer, and of a row that is continued
_LEAST, _COPIES, _LONGEST = 24, 3, 32  # of `repeats`
_SHOWN = 4  # examples


class Question(NamedTuple):
  """A question, and what a right answer contains."""

  text: str
  accepted: re.Pattern[str]


def questions() -> list[Question]:
  """The questions of `questions.json`, with regular expressions that match whole words in any case."""
  file = importlib.resources.files('adapt_jax.evaluation') / 'questions.json'
  found = json.loads(file.read_text(encoding='utf-8')).items()
  return [Question(text, re.compile(rf'(?<!\w)(?:{"|".join(any_of)})(?!\w)', re.I)) for text, any_of in found]


def repeats(tokens: Sequence[int]) -> bool:
  """Whether the end repeats itself: for an n up to 32 the last max(24, 3n) tokens are copies of n tokens."""

  def copies(n: int) -> bool:
    end = tokens[-max(_LEAST, _COPIES * n) :]
    return len(end) >= max(_LEAST, _COPIES * n) and end[n:] == end[:-n]

  return any(map(copies, range(1, _LONGEST + 1)))


def usable(tokens: Sequence[int], text: str, question: Question) -> bool:
  """Whether an answer, as tokens and as text, has an accepted string and does not end in repetition."""
  return bool(question.accepted.search(text)) and not repeats(tokens)


class Health:
  """Asks models the same questions, if there is a chat template that fits into the context.

  Otherwise they continue the first 8 tokens of rows that the dense model generated.

  Args:
    config, tokenizer, generation: of the dense model; its end tokens end an answer.
    own: returns these rows.
    compiler: counts compiles as `prefill` and `decode`.
    dtype: dtype of activations and products.
  """

  def __init__(
    self,
    config: ModelConfig,
    tokenizer: Any,
    generation: dict[str, Any],
    own: Callable[[], Blocks],
    *,
    compiler: Compiler,
    dtype: Any,
  ):
    self._tokenizer, self._compiler, self._dtype = tokenizer, compiler, dtype
    self._stop, longest = stop_ids(generation, tokenizer), config.max_position
    self._questions = questions() if tokenizer.chat_template else []
    self._prompts = encode_prompts([q.text for q in self._questions], tokenizer, chat=True)
    if longest - max(map(len, self._prompts), default=longest) < _LEAST:
      self._questions = []
      self._prompts = own().tokens[:, : min(_BEGINNING, longest // 2)].tolist()
    self._new = min(_NEW, longest - max(map(len, self._prompts)))

  def answers(self, config: ModelConfig, params: Params, title: str) -> list[list[int]]:
    """The tokens of a model's answers, all in one batch."""
    made: dict[str, Any] = {'compiler': self._compiler, 'dtype': self._dtype}
    generator = Generator(config, params, **made, max_batch=len(self._prompts))
    with Progress(title, len(self._prompts) * self._new, 'tokens') as progress:
      return generator.generate(self._prompts, self._new, stop_ids=self._stop, progress=progress)

  def report(self, dense: list[list[int]], result: list[list[int]] | None = None) -> HealthReport:
    """The rates of the dense model (or of the only one) and of the result, and a few answers of both."""
    report: HealthReport = {'answers': len(self._prompts), 'dense': self._rates(dense)}
    if result is not None:
      report |= {'result': self._rates(result), 'examples': self._examples(dense, result)}
    return report

  def _rates(self, answers: list[list[int]]) -> RatesReport:
    rates: RatesReport = {'repetition': sum(map(repeats, answers)) / len(answers)}
    if self._questions:
      pairs = zip(answers, self._questions, strict=True)
      rates['usable'] = sum(usable(ids, self._decode(ids), question) for ids, question in pairs)
    return rates

  def _examples(self, dense: list[list[int]], result: list[list[int]]) -> list[ExampleReport]:
    kind = QUESTION if self._questions else OWN
    prompts = [q.text for q in self._questions] or [*map(self._decode, self._prompts)]
    return [
      {'text': kind, 'prompt': prompt, 'dense': self._decode(before), 'result': self._decode(after)}
      for prompt, before, after in list(zip(prompts, dense, result, strict=True))[:_SHOWN]
    ]

  def _decode(self, ids: list[int]) -> str:
    text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
    return text
