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

from adapt_jax.models.errors import InputError

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


def content(row: dict[str, Any], where: str, text_field: str, messages_field: str) -> Content:
  """The row's text or messages; empty if it has a known form but no answer.

  Raises InputError, naming `where`, for a row of no known form and for a field that is not text.
  """
  if row.get(messages_field) is not None:
    return _messages(row[messages_field], f'{where}: field {messages_field!r}')
  if text_field in row:
    return _text(row[text_field], f'{where}: field {text_field!r}')
  for name in _LISTS:
    if row.get(name) is not None:
      return _messages(row[name], f'{where}: field {name!r}')
  for turn in _TURNS:
    if turn.question in row and turn.answer in row:
      return _conversation(row, turn, where)
  raise InputError(
    f'{where}: no field {messages_field!r} or {text_field!r} among {list(row)}, and no known format '
    '(docs/running.md): set data.text_field or data.messages_field to the one with the data'
  )


def _conversation(row: dict[str, Any], turn: _Turn, where: str) -> Content:
  def get(name: str) -> str:
    value = row.get(name)
    return '' if value is None else _text(value, f'{where}: field {name!r}')

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


def _text(value: Any, where: str) -> str:
  if not isinstance(value, str):
    raise InputError(f'{where} holds {type(value).__name__}, not text: leave such rows out')
  try:
    value.encode()
  except UnicodeEncodeError:  # JSON can contain half of a surrogate pair, which no tokenizer accepts
    raise InputError(f'{where} holds an unpaired surrogate (half a character): repair the text') from None
  return value


def _messages(value: Any, where: str) -> list[Message]:
  if not isinstance(value, list):
    raise InputError(f'{where} holds {type(value).__name__}, not a list of messages')
  return [_message(message, where) for message in value]


def _message(message: Any, where: str) -> Message:
  if isinstance(message, dict) and {'from', 'value'} <= message.keys() and 'content' not in message:
    speaker = _text(message['from'], f"{where}: 'from'")
    return {'role': _ROLES.get(speaker, speaker), 'content': _text(message['value'], f"{where}: 'value'")}
  if not isinstance(message, dict) or not {'role', 'content'} <= message.keys():
    found = sorted(message) if isinstance(message, dict) else type(message).__name__
    raise InputError(f"{where}: a message is {found}: it needs 'role' and 'content', or 'from' and 'value'")
  _text(message['role'], f"{where}: 'role'")
  _text(message['content'], f"{where}: 'content'")
  return message
