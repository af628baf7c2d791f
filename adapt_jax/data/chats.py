"""Conversations as text, by the tokenizer's chat template: code of others, with little time and memory."""

import dataclasses
import datetime
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from adapt_jax.data.documents import Document
from adapt_jax.data.records import Message
from adapt_jax.machine import bounded
from adapt_jax.models.errors import InputError, first_line

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
_CHARS = 1 << 14, 1 << 20  # rendered at once: at first, so that little is read beyond the need, and at most


class Refused(InputError):
  """Raised for a conversation that the chat template does not render; others of the source may be fine."""


@dataclasses.dataclass(frozen=True)
class Text:
  """A text to tokenise; `spans` are the assistant's [start, end) characters, None for plain text."""

  text: str
  spans: list[tuple[int, int]] | None = None

  @property
  def size(self) -> int:
    return len(self.text)


def render_all(documents: Iterable[Document], tokenizer: Any) -> Iterator[Text]:
  """The text of each document, in order. Raises InputError at the first one that cannot be rendered or read.

  Conversations are read ahead and rendered together.
  """
  source, most = iter(documents), _CHARS[0]
  failure: InputError | None = None
  while failure is None:
    chats: list[Document] = []
    size, plain = 0, None
    try:
      while plain is None and size < most:
        document = next(source)
        if isinstance(document.content, str):
          plain = document.content
        else:
          chats.append(document)
          size += document.size
    except StopIteration:
      most = 0
    except InputError as error:  # after what was read before it
      failure = error
    for text in try_to_render(chats, tokenizer):
      if isinstance(text, Refused):
        raise text
      yield text
    if plain is not None:
      yield Text(plain)
    if not most:
      return
    most = min(4 * most, _CHARS[1])
  raise failure


def try_to_render(chats: Sequence[Document], tokenizer: Any) -> list[Text | Refused]:
  """The text of each conversation, or why the template refuses it.

  Raises InputError if there is no template, and if it needs too much time or memory.
  """
  if not chats:
    return []
  if not tokenizer.is_fast:
    raise InputError(
      f'{chats[0].where}: a conversation, but the tokenizer is not a fast one: use a model with a '
      'tokenizer.json, or data with a text field'
    )
  if not tokenizer.chat_template:
    raise InputError(
      f'{chats[0].where}: a conversation, but the tokenizer has no chat template: set '
      "data.chat_template to 'plain' or to a file, or use an instruction-tuned model's tokenizer"
    )
  try:
    found = bounded.each(lambda chat: _answer(chat, tokenizer), chats)
  except bounded.Overrun as error:
    raise InputError(
      f'{chats[error.index].where}: the chat template needs more than {bounded.LIMITS} for this '
      f'conversation: set data.chat_template to another one'
    ) from None
  return [
    Refused(f'{chat.where}: {answer["refused"]}')
    if 'refused' in answer
    else Text(answer['text'], [(start, end) for start, end in answer['spans']])
    for chat, answer in zip(chats, found, strict=True)
  ]


def render_prompts(prompts: Sequence[list[Message]], tokenizer: Any, **options: Any) -> list[str]:
  """What the chat template makes of each prompt. Raises InputError with the reason alone if it fails."""

  def render(messages: list[Message]) -> dict[str, str]:
    try:
      return {'text': _apply(tokenizer, messages, **options)}
    except MemoryError:
      raise
    except Exception as error:  # anything that the template's code raises
      return {'refused': _reason(error)}

  try:
    found = bounded.each(render, prompts)
  except bounded.Overrun as error:
    raise InputError(f'it needs {error}') from None
  for answer in found:
    if 'refused' in answer:
      raise InputError(answer['refused'])
  return [str(answer['text']) for answer in found]


def user_prompts(texts: Sequence[str], tokenizer: Any) -> list[str]:
  """Users' messages, each up to the start of the answer. Raises InputError as `render_prompts`."""
  messages = [[{'role': 'user', 'content': text}] for text in texts]
  return render_prompts(messages, tokenizer, add_generation_prompt=True)


def day(tokenizer: Any) -> list[str]:
  """The day in the texts of a chat template that asks for it, as a part of cache keys; else empty."""
  return [_DATE] if _NOW in str(tokenizer.chat_template) else []


def _apply(tokenizer: Any, messages: list[Message], **options: Any) -> str:
  """What the chat template makes of the messages, on a fixed day.

  Raises UnicodeEncodeError for half a surrogate pair, which no tokenizer accepts, and what the template's
  code raises.
  """
  if day(tokenizer):
    options['chat_template'] = _FIXED + tokenizer.get_chat_template()
  text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DATE, **options)
  text.encode()
  return text


def _reason(error: Exception) -> str:
  from jinja2 import TemplateError  # what a template raises on purpose

  known = isinstance(error, (TemplateError, TypeError))
  return first_line(error) if known else f'{type(error).__name__}: {first_line(error)}'


def _answer(chat: Document, tokenizer: Any) -> dict[str, Any]:
  """What `_render` returns, or the reason why the template refuses the conversation, as JSON."""
  try:
    text, spans = _render(chat.content, tokenizer)
  except Refused as error:
    return {'refused': str(error)}
  except MemoryError:
    raise
  except Exception as error:  # anything that the template's code raises
    return {'refused': f'the chat template rejects this conversation ({_reason(error)})'}
  return {'text': text, 'spans': spans}


def _render(messages: Any, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
  if messages[0]['role'] == 'assistant':  # transformers renders no empty prompt
    raise Refused('the conversation starts with the assistant: put a system or user message first')

  def render(messages: list[Message], prompt: bool = False) -> str:
    bounded.restart()
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
      raise Refused(
        f'cannot locate the tokens of assistant message {index + 1} (the chat template '
        'renders it differently when more follows): use another template or plain text'
      )
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
