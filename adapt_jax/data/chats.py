"""Conversations as text, by the tokenizer's chat template, which transformers runs in Jinja's sandbox."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

from adapt_jax.data.documents import Document
from adapt_jax.data.records import Message
from adapt_jax.models.errors import InputError, reading

# The tokens must not depend on the day of the run, so this is the day: Llama's own fallback.
_TODAY = datetime.datetime(2024, 7, 26)
_DATE = _TODAY.strftime('%d %b %Y')
_NOW = 'strftime_now'  # transformers' function for templates: the time of the call in a format
_CODES = [*'aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ', *(f'-{c}' for c in 'deHIjklmMSUVWy')]
# Defines it anew in a template: transformers passes no functions on. Its `trim_blocks` drops the newline.
_FIXED = (
  f'{{% macro {_NOW}(format) %}}{{{{ format'
  + ''.join(f'.replace("%{code}", {json.dumps(_TODAY.strftime("%" + code))})' for code in _CODES)
  + ' }}{% endmacro %}\n'
)
_PROBE = 'Eyjafjallajökull'  # an answer that occurs in no template
_LONGEST = 1 << 24  # characters of a rendered conversation: a template that gives more is a faulty one


@dataclasses.dataclass(frozen=True)
class Text:
  """A text to tokenise; `spans` are the assistant's [start, end) characters, None for plain text."""

  text: str
  spans: list[tuple[int, int]] | None = None


def try_to_render(chat: Document, tokenizer: Any) -> Text | InputError:
  """The text of a conversation, or the error if the template refuses it; InputError without one."""
  if not (tokenizer.is_fast and tokenizer.chat_template):
    raise InputError(
      f'{chat.where}: a conversation, but the tokenizer has no tokenizer.json or no chat template: set '
      "data.chat_template to 'plain' or to a file, or use an instruction-tuned model's tokenizer"
    )
  try:
    with reading(
      f'{chat.where}: the chat template', remedy='leave the conversation out, or use another template'
    ):
      return Text(*_render(chat.content, tokenizer))
  except InputError as error:
    return error


def render_prompts(prompts: Sequence[list[Message]], tokenizer: Any, **options: Any) -> list[str]:
  """Renders each prompt with the chat template. Raises InputError if it refuses one."""
  with reading('the chat template', remedy='set data.chat_template, or use plain text'):
    return [_apply(tokenizer, messages, **options) for messages in prompts]


def day(tokenizer: Any) -> list[str]:
  """The day in the texts of a chat template that asks for it, as a part of cache keys; else empty."""
  return [_DATE] if _NOW in str(tokenizer.chat_template) else []


def _apply(tokenizer: Any, messages: list[Message], **options: Any) -> str:
  """What the chat template makes of the messages, on a fixed day.

  Raises ValueError for a text that is too long or has half of a surrogate pair, which no tokenizer accepts,
  and what the template's code raises.
  """
  if day(tokenizer):
    options['chat_template'] = _FIXED + tokenizer.get_chat_template()
  text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE, **options)
  if len(text) > _LONGEST:
    raise ValueError(f'it gives {len(text):,} characters')
  text.encode()
  return text


def _render(messages: Any, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
  if messages[0]['role'] == 'assistant':  # transformers renders no empty prompt
    raise ValueError('the conversation starts with the assistant, not with a system or user message')

  def render(messages: list[Message], prompt: bool = False) -> str:
    return _apply(tokenizer, messages, add_generation_prompt=prompt)

  spans: list[tuple[int, int]] = []
  whole, searched = render(messages), False
  for index in (i for i, message in enumerate(messages) if message['role'] == 'assistant'):
    prompt, answered = render(messages[:index], True), render(messages[: index + 1])
    begun = prompt
    if not answered.startswith(prompt):
      # Some prompts already begin the answer, such as DeepSeek-R1's with <think>: use the place where
      # another answer would start.
      other = render([*messages[:index], messages[index] | {'content': _PROBE}])
      begun = other.partition(_PROBE)[0]
    if not whole.startswith(answered):  # some templates end every conversation with EOS, such as Phi-3's
      answered = answered.removesuffix(tokenizer.eos_token or '')
    span: tuple[int, int] | None = len(begun), len(answered)
    if not answered.startswith(begun) or not whole.startswith(answered):
      # Some templates render an answer differently when a user message follows, such as Qwen3's.
      span, searched = _search(whole, messages, index, prompt, render, tokenizer.eos_token or ''), True
    if span is None or (searched and spans and span[0] < spans[-1][1]):
      raise ValueError(f'it renders assistant message {index + 1} differently when more follows')
    spans.append(span)
  return whole, spans


def _search(
  whole: str, messages: list[Message], index: int, prompt: str, render: Callable[..., str], eos: str
) -> tuple[int, int] | None:
  """The span of an answer in `whole`: what changes there with the answer, and the end marker after it.

  As elsewhere, the span starts where `prompt` ends, if `whole` has it. Returns None if the span is in doubt.
  """
  probe = messages[index] | {'content': _PROBE}
  # Two parts each, unless the template leaves the answer out or the probe occurs more than once.
  parts = render([*messages[:index], probe, *messages[index + 1 :]]).split(_PROBE)
  last = render([*messages[:index], probe]).split(_PROBE)
  if len(parts) != 2 or len(last) != 2:
    return None
  (before, after), (_, end) = parts, last
  stop = len(whole) - len(after)
  if len(before) > stop or not whole.startswith(before) or not whole.endswith(after):
    return None
  start = len(prompt) if whole.startswith(prompt) and len(prompt) <= stop else len(before)
  for marker in (end, end.strip() or end, end.removesuffix(eos)):
    if after.startswith(marker):
      return start, stop + len(marker)
  return None
