"""The text or conversation of a data set's row, recognised by the names of its fields.

`data.messages_field` and `data.text_field` take precedence. Otherwise a row must have one of these forms:

    conversation, conversations                    lists of messages (WildChat, LMSYS-Chat, OpenHermes)
    [system_prompt] question -> response           OpenOrca
    instruction [context] -> response              dolly-15k, UltraInteract
    instruction [input] -> output                  alpaca-cleaned, OpenO1-SFT

A message is {role, content} or ShareGPT's {from, value}. The paper's program makes a system and a user turn
of each row with `system_prompt`, `context` or `input`, even of empty fields. Where these are not the messages
here, the user's message has them in its key `turns`, for the chat template `paper`.
"""

import dataclasses
from typing import Any

Message = dict[str, Any]  # 'role' and 'content' are strings; other keys are passed to the chat template
Content = str | list[Message]

_LISTS = ('conversation', 'conversations')
_ROLES = {'human': 'user', 'gpt': 'assistant'}  # ShareGPT's names; others are kept


@dataclasses.dataclass(frozen=True)
class _Turn:
  """Fields of one question and its answer; `system` and `more`, which follows the question, may be absent."""

  question: str
  answer: str
  system: str = ''
  more: str = ''


_TURNS = (
  _Turn('question', 'response', system='system_prompt'),
  _Turn('instruction', 'response', more='context'),
  _Turn('instruction', 'output', more='input'),
)
_FIELDS = {name for turn in _TURNS for name in dataclasses.astuple(turn) if name}.union(_LISTS)


def columns(names: list[str], text_field: str, messages_field: str) -> list[str]:
  """The columns of a table that `content` may read; all columns if it knows none of them."""
  return [name for name in names if name in {text_field, messages_field, *_FIELDS}] or names


def content(row: dict[str, Any], text_field: str, messages_field: str) -> Content:
  """The row's text or messages; empty if it has a known form but no answer.

  Raises ValueError, or another error, for a row of no known form and for a field that is not text.
  """
  if row.get(messages_field) is not None:
    return _messages(row[messages_field])
  if text_field in row:
    return _text(row[text_field])
  for name in _LISTS:
    if row.get(name) is not None:
      return _messages(row[name])
  for turn in _TURNS:
    if turn.question in row and turn.answer in row:
      return _conversation(row, turn)
  raise ValueError(f'it has no field {text_field!r} or {messages_field!r}, but {list(row)}')


def _conversation(row: dict[str, Any], turn: _Turn) -> Content:
  def get(name: str) -> str:
    value = row.get(name)
    return '' if value is None else _text(value)

  if not get(turn.answer).strip():
    return ''  # nothing to learn: skipped, like empty texts
  asked = '\n\n'.join(filter(None, (get(turn.question), get(turn.more))))
  system = [{'role': 'system', 'content': get(turn.system)}] if get(turn.system) else []
  user: Message = {'role': 'user', 'content': asked}
  if turn.more in row:
    user['turns'] = {'system': get(turn.question), 'user': get(turn.more)}
  elif turn.system in row and not system:
    user['turns'] = {'system': '', 'user': asked}
  return [*system, user, {'role': 'assistant', 'content': get(turn.answer)}]


def _text(value: Any) -> str:
  """The string itself; an error for anything else, and for half of a surrogate pair, as JSON may have."""
  return str(value.encode(), 'utf-8')


def _messages(value: Any) -> list[Message]:
  return [_message(message) for message in value]


def _message(message: Message) -> Message:
  if {'from', 'value'} <= message.keys() and 'content' not in message:
    speaker = _text(message['from'])
    return {'role': _ROLES.get(speaker, speaker), 'content': _text(message['value'])}
  return message | {name: _text(message[name]) for name in ('role', 'content')}
