"""Rows of the published instruction sets as they are, and templates for tokenizers without one."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from adapt_jax.data import records
from adapt_jax.data.chat_templates import read_template, with_template
from adapt_jax.data.documents import Document, check_source, read_documents
from adapt_jax.data.tokenise import encode
from adapt_jax.models.errors import InputError
from tests.support.tokenizers_for_tests import render, tiny_tokenizer

NAMES = {'text_field': 'text', 'messages_field': 'messages'}
ASKED, ANSWER = {'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A'}
SYSTEM = {'role': 'system', 'content': 'S'}
# As the data sets' cards show them, other columns left out but for some that could mislead.
SETS = {
  'plain text': ({'id': '1', 'text': 'T', 'messages': None}, 'T'),
  'OpenOrca': ({'id': '1', 'system_prompt': 'S', 'question': 'Q', 'response': 'A'}, [SYSTEM, ASKED, ANSWER]),
  'OpenOrca, no system': (
    {'system_prompt': '', 'question': 'Q', 'response': 'A'},
    [ASKED | {'turns': {'system': '', 'user': 'Q'}}, ANSWER],
  ),
  'OpenHermes-2.5': (
    {
      'system_prompt': None,
      'model': None,
      'conversations': [
        {'from': 'system', 'value': 'S', 'weight': None},
        {'from': 'human', 'value': 'Q', 'weight': None},
        {'from': 'gpt', 'value': 'A', 'weight': None},
      ],
    },
    [SYSTEM, ASKED, ANSWER],
  ),
  'dolly-15k': (
    {'instruction': 'Q', 'context': 'C', 'response': 'A', 'category': 'qa'},
    [{'role': 'user', 'content': 'Q\n\nC', 'turns': {'system': 'Q', 'user': 'C'}}, ANSWER],
  ),
  'WildChat-1M': (
    {'conversation': [ASKED | {'toxic': False}, ANSWER | {'toxic': True}], 'turn': 1, 'model': 'm'},
    [ASKED | {'toxic': False}, ANSWER | {'toxic': True}],
  ),
  'ultrachat_200k': ({'prompt': 'Q', 'prompt_id': '1', 'messages': [ASKED, ANSWER]}, [ASKED, ANSWER]),
  'UltraInteract_sft': ({'task': 't', 'instruction': 'Q', 'response': 'A', 'id': '1'}, [ASKED, ANSWER]),
  'alpaca-cleaned': (
    {'instruction': 'Q', 'input': 'I', 'output': 'A'},
    [{'role': 'user', 'content': 'Q\n\nI', 'turns': {'system': 'Q', 'user': 'I'}}, ANSWER],
  ),
  'OpenO1-SFT': ({'instruction': 'Q', 'output': 'A'}, [ASKED, ANSWER]),
}


@pytest.mark.parametrize('name', SETS)
def test_rows_of_the_published_sets(tmp_path, name):
  row, expected = SETS[name]
  (tmp_path / 'a.jsonl').write_text(json.dumps(row) + '\n')
  parquet.write_table(pa.Table.from_pylist([row]), tmp_path / 'a.parquet')
  for file in ('a.jsonl', 'a.parquet'):
    source = (str(tmp_path / file),)
    check_source(source, 'train.source', **NAMES)
    (document,) = read_documents(source, 'train.source', **NAMES)
    assert document.content == expected


def test_configured_fields_go_first():
  row = SETS['dolly-15k'][0] | {'conversation': [ANSWER]}
  assert records.content(row | {'text': 'T'}, **NAMES) == 'T'
  assert records.content(row | {'text': 'T', 'messages': [ASKED]}, **NAMES) == [ASKED]
  assert records.content(row, 'response', 'messages') == 'A'
  assert records.content(row, 'text', 'conversation') == records.content(row, **NAMES) == [ANSWER]


def test_rows_without_an_answer_are_left_out(tmp_path):
  answers = [None, '', ' \n', 'A']
  lines = [json.dumps({'instruction': 'Q', 'input': None, 'output': answer}) for answer in answers]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  user = ASKED | {'turns': {'system': 'Q', 'user': ''}}
  assert [d.content for d in read_documents((str(tmp_path),), '', **NAMES)] == [[user, ANSWER]]


@pytest.mark.parametrize('content', ['[{"text": "x"},\n {"text": "y"}]', '{"text": "x"}\n\n{"text": "y"}\n'])
def test_json_is_a_list_of_rows_or_a_row_a_line(tmp_path, content):
  (tmp_path / 'a.json').write_text(content, encoding='utf-8-sig')
  found = list(read_documents((str(tmp_path),), 'train.source', **NAMES))
  assert [document.content for document in found] == ['x', 'y']


# Chat templates

CHAT = [SYSTEM, ASKED, ANSWER, {'role': 'user', 'content': 'Q2'}, {'role': 'assistant', 'content': 'A2'}]


def test_plain_gives_base_models_conversations():
  base = tiny_tokenizer(None)
  tokenizer = with_template(base, 'plain')
  assert base.chat_template is None and with_template(base, '') is base
  text = render(Document('', CHAT), tokenizer)
  assert text.text == (
    '<s>S\n\nUser: Q\n\nAssistant: A</s>\n\nUser: Q2\n\nAssistant: A2</s>'  # '<s>' as before plain text
  )
  encoded = encode([text], tokenizer)
  kept = tokenizer.decode(encoded.tokens[encoded.targets])
  assert kept == ' A</s> A2</s>' and tokenizer.decode(encoded.tokens) == text.text
  prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, tokenize=False)
  assert text.text.startswith(prompt) and prompt.endswith('Assistant:')


def test_paper_is_chatml_with_a_system_message_and_one_eos():
  tokenizer = with_template(tiny_tokenizer(None), 'paper')
  text = render(Document('', CHAT[1:]), tokenizer)
  assert text.text == (
    '<s><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n'
    '<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n'
    '<|im_start|>assistant\nA2<|im_end|>\n</s>'
  )
  prompt = tokenizer.apply_chat_template(CHAT[1:4], add_generation_prompt=True, tokenize=False)
  assert text.text == prompt + 'A2<|im_end|>\n</s>'
  encoded = encode([text], tokenizer)
  assert tokenizer.decode(encoded.tokens[encoded.targets]) == 'A<|im_end|>\nA2<|im_end|>\n</s>'
  two = render(Document('', SETS['dolly-15k'][1]), tokenizer)  # a system and a user turn of one row
  assert two.text == (
    '<s><|im_start|>system\nQ<|im_end|>\n<|im_start|>user\nC<|im_end|>\n'
    '<|im_start|>assistant\nA<|im_end|>\n</s>'
  )


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('plain', 'S\n\nUser: Q\n\nAssistant: A'),
    (
      'paper',
      '<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n',
    ),
  ],
)
def test_built_in_templates_without_special_tokens_and_with_unknown_roles(name, expected):
  tokenizer = tiny_tokenizer(None)
  tokenizer.bos_token = tokenizer.eos_token = None
  tokenizer = with_template(tokenizer, name)
  assert render(Document('', CHAT[:3]), tokenizer).text == expected
  with pytest.raises(InputError, match='no role tool'):
    render(Document('here', [ASKED, {'role': 'tool', 'content': 'x'}]), tokenizer)


def test_template_of_a_file(tmp_path):
  path = tmp_path / 'mine.jinja'
  path.write_text('{% for m in messages %}{{ m.content }};{% endfor %}')
  tokenizer = with_template(tiny_tokenizer(), str(path))
  assert render(Document('', [ASKED, ANSWER]), tokenizer).text == 'Q;A;'


def test_templates_that_cannot_be_read(tmp_path):
  (tmp_path / 'empty').write_text('\n')
  (tmp_path / 'binary').write_bytes(b'\xff')
  for name in ('plane', str(tmp_path), str(tmp_path / 'empty'), str(tmp_path / 'binary')):
    with pytest.raises(InputError, match=name):
      read_template(name)
