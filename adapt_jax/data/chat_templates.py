"""Chat templates for tokenizers without one, such as those of base models.

They are Jinja, as in `transformers`, with `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.
"""

import copy
from typing import Any

from adapt_jax.models.errors import reading
from adapt_jax.models.files import local, read_text

# The prompt ends before the space, so that the first word of an answer has the same token as elsewhere.
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
# ChatML as the paper's program writes it: there is always a system message, and `turns` are those of
# `adapt_jax.data.records`. EOS follows the last answer, which makes it a target.
_PAPER = (
  "{% if messages[0]['role'] != 'system' and messages[0]['turns'] is not defined %}"
  "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
  '{% for message in messages %}'
  "{% if message['turns'] is defined %}"
  "{{ '<|im_start|>system\\n' + message['turns']['system'] + '<|im_end|>\\n' }}"
  "{{ '<|im_start|>user\\n' + message['turns']['user'] + '<|im_end|>\\n' }}"
  "{% elif message['role'] in ['system', 'user', 'assistant'] %}"
  "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
  "{% else %}{{ raise_exception('no role ' + message['role'] + ' in the template paper') }}{% endif %}"
  "{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BUILT_IN = {'plain': _PLAIN, 'paper': _PAPER}


def read_template(name: str) -> str:
  """The template of `data.chat_template`: a built-in one or that of a file; '' for ''. Raises InputError."""
  if not name or name in BUILT_IN:
    return BUILT_IN.get(name, '')
  with reading(f'data.chat_template = {name!r}', remedy=f'give a Jinja file or one of {", ".join(BUILT_IN)}'):
    text = read_text(local(name))
    if not text.strip():
      raise ValueError('the file is empty')
  return text


def with_template(tokenizer: Any, name: str) -> Any:
  """A copy of the tokenizer with the template `name`; the tokenizer itself for ''.

  A built-in template begins with BOS if the tokenizer adds one before plain text.
  """
  if not name:
    return tokenizer
  template = read_template(name)
  if name in BUILT_IN and tokenizer.bos_token and tokenizer('')['input_ids'][:1] == [tokenizer.bos_token_id]:
    template = '{{ bos_token }}' + template
  other = copy.copy(tokenizer)
  other.chat_template = template
  return other
