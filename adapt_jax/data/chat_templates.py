"""Chat templates for tokenizers that bring none, as those of base models do.

They are Jinja as `transformers` runs it: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`.
"""

import copy
import pathlib
from typing import Any

from adapt_jax.models.errors import InputError

# The prompt ends before the space, so that a word that begins the answer is the token that it is elsewhere.
_PLAIN = (
  '{% for message in messages %}'
  "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
  "{% if message['role'] == 'system' %}{{ message['content'] }}"
  "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] }}{{ eos_token }}"
  "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] }}"
  "{% else %}{{ raise_exception('no role ' + message['role'] + ' in the template plain') }}{% endif %}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
BUILT_IN = {'plain': _PLAIN}


def read_template(name: str) -> str:
  """The template of `data.chat_template`: a built-in one or a file's; '' stays ''. Raises InputError."""
  if not name or name in BUILT_IN:
    return BUILT_IN.get(name, '')
  try:
    text = pathlib.Path(name).expanduser().read_text(encoding='utf-8')
  except (OSError, ValueError, RuntimeError) as error:
    reason = getattr(error, 'strerror', None) or 'not a text file'
    raise InputError(
      f'config.data.chat_template = {name!r} cannot be read ({reason}): give a file of Jinja or one of '
      f'{", ".join(BUILT_IN)}'
    ) from None
  if not text.strip():
    raise InputError(f'config.data.chat_template = {name!r} is an empty file: give a template')
  return text


def with_template(tokenizer: Any, name: str) -> Any:
  """A copy of the tokenizer that has the template `name`; the tokenizer itself for ''.

  A built-in template begins with BOS where the tokenizer puts one before plain text.
  """
  if not name:
    return tokenizer
  template = read_template(name)
  if name in BUILT_IN and tokenizer.bos_token and tokenizer('')['input_ids'][:1] == [tokenizer.bos_token_id]:
    template = '{{ bos_token }}' + template
  found = copy.copy(tokenizer)
  found.chat_template = template
  return found
