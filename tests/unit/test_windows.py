"""Sources of every kind, windows, the assistant's tokens, and draws of rows."""

import json
import pathlib
import sys
from typing import Any

import datasets
import numpy as np
import pytest

from adapt_jax.data import documents, windows
from adapt_jax.data.chats import render_prompts
from adapt_jax.data.documents import Document, check_source, is_blocks, read_documents
from adapt_jax.data.tokenise import encode_prompts
from adapt_jax.data.windows import Blocks, check_vocab, draw_rows, load_blocks, load_stream
from adapt_jax.models.errors import InputError, Unreachable
from tests.support.tokenizers_for_tests import CHATML, CHATML_DEFAULT_SYSTEM, render, tiny_tokenizer

FIELD = 'train.source'
NAMES = {'text_field': 'text', 'messages_field': 'messages'}
DOCUMENTS = ['The dog sleeps.', 'It was the worst of times.', 'Two and three: 5 café 😀']
CHAT = [
  {'role': 'user', 'content': 'What is two and three?'},
  {'role': 'assistant', 'content': 'The sum is five 😀.'},
  {'role': 'user', 'content': 'assistant: and the dog?'},
  {'role': 'assistant', 'content': 'It sleeps.\n'},
]
# As Qwen3 does: only an answer after the last user message has a block of thoughts, even an empty one.
QWEN3 = (
  '{% set ns = namespace(last_query_index=messages|length - 1) %}'
  "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last_query_index = loop.index0 %}{% endif %}"
  "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content %}"
  "{% if m.role == 'assistant' %}{% set reasoning_content = '' %}{% if '</think>' in content %}"
  "{% set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
  "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
  '{% if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}'
  "{{ '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}"
  "{% set content = content.lstrip('\n') %}"
  "{% endif %}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope='module')
def tokenizer() -> Any:
  return tiny_tokenizer()


@pytest.fixture(autouse=True)
def here_and_offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(documents, '_hub_revision', str)


def load(source: Any, tokenizer: Any, length: int = 8, **options: Any) -> Blocks:
  source = tuple(map(str, source)) if isinstance(source, (tuple, list)) else (str(source),)
  limit = options.pop('max_tokens', sys.maxsize)
  if is_blocks(source):
    return load_blocks(source, length, limit, FIELD)
  place, fields = pathlib.Path('cache'), {**NAMES, 'field': FIELD, **options}
  return load_stream(place, source, tokenizer, limit, None, **fields).blocks(length, FIELD)


def write_jsonl(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def write_texts(path: pathlib.Path, texts: list[str]) -> pathlib.Path:
  return write_jsonl(path, [{'text': text} for text in texts])


def stream(tokenizer: Any, texts: list[str]) -> list[int]:
  """The tokens that `texts` should become: BOS, text, EOS, one after another."""
  encode = tokenizer.backend_tokenizer.encode
  ends = tokenizer.bos_token_id, tokenizer.eos_token_id
  return [i for text in texts for i in (ends[0], *encode(text, add_special_tokens=False).ids, ends[1])]


def assert_windows(blocks: Blocks, expected: list[int], length: int = 8) -> None:
  rows = len(expected) // length
  assert rows and blocks.tokens.dtype == np.int32 and blocks.targets.dtype == np.bool_
  np.testing.assert_array_equal(blocks.tokens, np.reshape(expected[: rows * length], (rows, length)))
  assert blocks.targets.shape == blocks.tokens.shape


def message_of(call: Any, *arguments: Any, **options: Any) -> str:
  with pytest.raises(InputError) as caught:
    call(*arguments, **options)
  assert '\n' not in str(caught.value)
  return str(caught.value)


# Sources


def test_jsonl_with_other_field_bom_and_blank_and_empty_rows_and_no_bos_as_target(tmp_path, tokenizer):
  path = tmp_path / 'a.jsonl'
  rows = [{'body': text} for text in ('', *DOCUMENTS)]
  path.write_text('\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8-sig')
  blocks = load(path, tokenizer, text_field='body')
  assert_windows(blocks, stream(tokenizer, DOCUMENTS))
  bos = blocks.tokens == tokenizer.bos_token_id
  assert bos[:, 1:].any() and (blocks.targets[:, 1:] == ~bos[:, 1:]).all() and blocks.documents == 3


def test_directory_is_read_sorted_and_recursively_and_entries_keep_their_order(tmp_path, tokenizer):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'inner.tokens').write_text(DOCUMENTS[1])
  (tmp_path / 'a.txt').write_text(DOCUMENTS[0])
  write_texts(tmp_path / 'c.jsonl', DOCUMENTS[2:])
  (tmp_path / 'README.md').write_text('not data')
  check_source((str(tmp_path),), FIELD, **NAMES)
  assert_windows(load(tmp_path, tokenizer), stream(tokenizer, DOCUMENTS))
  several = load([tmp_path / name for name in ('c.jsonl', '[ab]*')], tokenizer)
  assert_windows(several, stream(tokenizer, [DOCUMENTS[2], *DOCUMENTS[:2]]))


@pytest.mark.parametrize(
  ('entry', 'arguments', 'split'),
  [('org/name', ('org/name',), 'train'), ('org/na.me:en-1.0:test', ('org/na.me', 'en-1.0'), 'test')],
)
def test_hub(monkeypatch, tokenizer, entry, arguments, split):
  def load_dataset(*args: str, **options: Any) -> Any:
    assert (args, options) == (arguments, {'split': split, 'streaming': True})
    return datasets.Dataset.from_dict({'text': DOCUMENTS}).to_iterable_dataset()

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  check_source((entry,), FIELD, **NAMES)
  assert_windows(load(entry, tokenizer), stream(tokenizer, DOCUMENTS))


def test_the_lines_of_wikitext_are_joined_to_articles(monkeypatch, tokenizer):
  first = ['', ' = A title = \n', '', ' The dog sleeps . \n', ' = = A part = = \n', ' The cat too . \n', '']
  second = [' = B = \n', ' It sleeps . \n']
  rows = datasets.Dataset.from_dict({'text': [*first, *second]}).to_iterable_dataset()
  monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: rows)
  blocks = load('Salesforce/wikitext:wikitext-2-raw-v1:test', tokenizer)
  assert_windows(blocks, stream(tokenizer, [''.join(first), ''.join(second)]))
  assert blocks.documents == 2


def test_a_hub_that_is_away_is_told_from_a_wrong_name(monkeypatch):
  def fail(error: Exception) -> None:
    def load_dataset(*_: str, **__: Any) -> Any:
      raise error

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)

  fail(datasets.exceptions.DatasetNotFoundError("Dataset 'org/name' doesn't exist\nmore"))
  assert 'org/name' in message_of(check_source, ('org/name',), FIELD, **NAMES)
  fail(ConnectionError("Couldn't reach 'org/name' on the Hub (ConnectTimeout)"))
  with pytest.raises(Unreachable):
    check_source(('org/name',), FIELD, **NAMES)
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)  # then it always will be
  with pytest.raises(InputError) as caught:
    check_source(('org/name',), FIELD, **NAMES)
  assert not isinstance(caught.value, Unreachable)


def test_npy_is_taken_as_it_is(tmp_path):
  rows = np.arange(24, dtype=np.int64).reshape(3, 8)
  np.save(tmp_path / 'a.npy', rows)
  check_source((str(tmp_path / 'a.npy'),), FIELD, **NAMES)
  blocks = load(tmp_path / 'a.npy', None)
  assert_windows(blocks, list(range(24)))
  assert not blocks.targets[:, 0].any() and blocks.targets[:, 1:].all()
  assert len(load(tmp_path / 'a.npy', None, max_tokens=17).tokens) == 2
  check_vocab(23, 24, FIELD)
  message_of(check_vocab, 23, 23, FIELD)
  for other in (rows[:, :7], rows.ravel(), rows * 1.0, rows - 1, rows + 2**31, rows.astype(object), rows[:0]):
    np.save(tmp_path / 'a.npy', other)
    message_of(load, tmp_path / 'a.npy', None)


def test_globs_match_as_in_a_shell_and_follow_no_links_in_circles(tmp_path):
  for name in ('a/b/1.txt', 'a/.hidden/2.txt', 'a/.hidden/.4.txt', 'a/x3.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  (tmp_path / 'a/b/z').symlink_to(tmp_path)
  for entry, count in (('**/*.txt', 2), ('a/**/x**.txt', 1), ('./a/.hidden/**/*.txt', 1), ('a/**', 4)):
    assert len(list(read_documents((entry,), FIELD, **NAMES))) == count
    assert len(list(read_documents((str(tmp_path / entry),), FIELD, **NAMES))) == count


# Windows


def test_no_eos_twice_and_none_without_one(tmp_path, tokenizer):
  path = write_texts(tmp_path / 'a.jsonl', ['The dog.</s>'] * 4)
  assert_windows(load(path, tokenizer), stream(tokenizer, ['The dog.'] * 4))
  bare = tiny_tokenizer()
  bare.eos_token = None
  expected = [i for i in stream(tokenizer, DOCUMENTS) if i != tokenizer.eos_token_id]
  assert_windows(load(write_texts(tmp_path / 'b.jsonl', DOCUMENTS), bare), expected)


@pytest.mark.parametrize('beyond', [0, 1])
def test_exactly_the_tokens_asked_for_whatever_the_cache_holds(tmp_path, tokenizer, beyond):
  (tmp_path / 'b.txt').write_text('The lazy dog.')
  path = write_texts(tmp_path / 'a.jsonl', DOCUMENTS * 100)
  expected = stream(tokenizer, DOCUMENTS * 100)
  ends = np.cumsum([len(stream(tokenizer, [text])) for text in DOCUMENTS * 100])
  limit = int(ends[20]) + beyond  # the end of a document, or the first token of the next
  for whole in (False, True):
    if whole:
      load(path, tokenizer)  # the cache holds all
    blocks = load([path, tmp_path / 'b.txt'], tokenizer, max_tokens=limit)
    assert_windows(blocks, expected[:limit])
    assert blocks.documents == 21 + beyond
  both = load([path, tmp_path / 'b.txt'], tokenizer, max_tokens=len(expected) + 3)
  assert_windows(both, [*expected, *stream(tokenizer, ['The lazy dog.'])[:3]])
  assert both.documents == 301


# Conversations


def marked(blocks: Blocks, tokenizer: Any) -> list[str]:
  """The text of each run of consecutive targets."""
  tokens, targets = blocks.tokens.ravel(), blocks.targets.ravel()
  edges = np.flatnonzero(np.diff(np.concatenate([[False], targets, [False]])))
  return [tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def one_window(path: pathlib.Path, messages: list[Any], tokenizer: Any) -> Blocks:
  """The conversation in exactly one window, up to its EOS."""
  text = tokenizer.apply_chat_template(messages, tokenize=False)
  length = len(tokenizer(text, add_special_tokens=False)['input_ids']) + 1
  return load(write_jsonl(path, [{'messages': messages}]), tokenizer, length)


@pytest.mark.parametrize('system', [[], [{'role': 'system', 'content': 'Be kind.'}]])
@pytest.mark.parametrize('template', [CHATML, CHATML_DEFAULT_SYSTEM])
def test_only_the_assistants_tokens_are_targets(tmp_path, template, system):
  tokenizer = tiny_tokenizer(template)
  blocks = one_window(tmp_path / 'a.jsonl', system + CHAT, tokenizer)
  text = tokenizer.apply_chat_template(system + CHAT, tokenize=False)
  assert tokenizer.decode(blocks.tokens[0]) == text + '</s>'
  assert ('You are terse.' in text) == (template != CHATML and not system)
  assert marked(blocks, tokenizer) == ['The sum is five 😀.<|im_end|>\n', 'It sleeps.\n<|im_end|>\n']
  assert tokenizer.bos_token_id not in blocks.tokens and not blocks.targets[0, -1]
  plain = load(write_texts(tmp_path / 'b.jsonl', DOCUMENTS), tokenizer)
  assert blocks.has_chats(tokenizer.bos_token_id) and not plain.has_chats(tokenizer.bos_token_id)


def test_template_that_strips_and_tokens_across_the_border(tmp_path):
  # ' Yes' is one token whose space belongs to the prompt 'A: '; the stray space ' ' alone is the prompt's.
  tokenizer = tiny_tokenizer(
    "{% for m in messages %}{{ ('A: ' if m.role == 'assistant' else 'Q: ') + m.content.strip() + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
  )
  chat = [{'role': 'user', 'content': ' The dog '}, {'role': 'assistant', 'content': '  the dog sleeps '}]
  assert marked(one_window(tmp_path / 'a.jsonl', chat, tokenizer), tokenizer) == [' the dog sleeps\n']
  chat[1] = {'role': 'assistant', 'content': '<|im_start|>  it'}
  assert marked(one_window(tmp_path / 'b.jsonl', chat, tokenizer), tokenizer) == ['<|im_start|>  it\n']


def test_the_day_does_not_change_the_tokens():
  """Whether a template takes the day or asks for it, as SmolLM3's and Granite's do."""
  given = tiny_tokenizer("{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML)
  assert render_prompts([CHAT], given)[0].startswith('26 Jul 2024<|im_start|>')
  asked = tiny_tokenizer(
    '\n{{ strftime_now("%d %B %Y") }}{{ strftime_now("%-m/%y, %A %F %D %k") }}\n\n' + CHATML
  )
  template = asked.chat_template
  day = '26 July 20247/24, Friday 2024-07-26 07/26/24  0\n\n'
  assert render_prompts([CHAT], asked)[0].startswith('\n' + day + '<|im_start|>')
  assert asked.chat_template == template
  plain = '\n  {% if true %}x{% endif %}\n' + CHATML  # white space stays as it is
  used = plain + '{% if false %}{{ strftime_now("") }}{% endif %}'
  assert render_prompts([CHAT], tiny_tokenizer(plain)) == render_prompts([CHAT], tiny_tokenizer(used))


def test_a_prompt_that_begins_the_answer(tmp_path):
  """As DeepSeek-R1's, which ends with <think>: targets are what stands after the header all the same."""
  path = write_jsonl(tmp_path / 'a.jsonl', [{'messages': CHAT}])
  begun = CHATML.replace("assistant\n' }}", "assistant\n<think>' }}")
  assert begun != CHATML
  plain, thinking = (load(path, tiny_tokenizer(template)) for template in (CHATML, begun))
  np.testing.assert_array_equal(thinking.tokens, plain.tokens)
  np.testing.assert_array_equal(thinking.targets, plain.targets)


MORE = [
  {'role': 'user', 'content': 'And now?'},
  {'role': 'assistant', 'content': '<think>\nof foxes\n</think>\n\nThe fox jumps.'},
]


@pytest.mark.parametrize('system', [[], [{'role': 'system', 'content': 'Be kind.'}]])
@pytest.mark.parametrize(
  ('messages', 'answers'),
  [
    (CHAT, ['The sum is five 😀.', '<think>\n\n</think>\n\nIt sleeps.\n']),
    (CHAT + MORE, ['The sum is five 😀.', 'It sleeps.\n', '<think>\nof foxes\n</think>\n\nThe fox jumps.']),
    (CHAT[:2] + MORE + CHAT[2:3], ['The sum is five 😀.', 'The fox jumps.']),
    (CHAT[:2] + [CHAT[3], *MORE[:1]], ['The sum is five 😀.', 'It sleeps.\n']),
    ([CHAT[0], CHAT[1] | {'content': '\n five\n'}, *MORE[:1]], ['\n five\n']),
    ([CHAT[0], CHAT[1] | {'content': ''}, *CHAT[:2]], ['', '<think>\n\n</think>\n\nThe sum is five 😀.']),
  ],
  ids=['two', 'three', 'thoughts are left out', 'no user between', 'white space', 'empty'],
)
def test_answers_that_look_different_when_more_follows(tmp_path, messages, answers, system):
  """As Qwen3's: the targets are what the model writes after the header of its turn in this conversation."""
  tokenizer = tiny_tokenizer(QWEN3)
  blocks = one_window(tmp_path / 'a.jsonl', system + messages, tokenizer)
  assert marked(blocks, tokenizer) == [answer + '<|im_end|>\n' for answer in answers]
  text = tokenizer.apply_chat_template(system + messages, tokenize=False)
  assert tokenizer.decode(blocks.tokens[0]) == text + '</s>'


BROKEN = {
  'no template': None,
  'answer first': "{{ messages[-1]['content'] }}" + CHATML,
  'answers vary': CHATML.replace(
    "message['content']", "(message['content'] if loop.last or loop.index is odd else '')"
  ),
  'end varies': CHATML.replace("'<|im_end|>\n'", "('<|im_end|>\n' if loop.last else '|')"),
  'last answer first': "{% if messages|length == 4 %}{{ messages[-1]['content'] }}{% endif %}" + CHATML,
  'raises': "{{ raise_exception('no such role') }}",
  'recursion': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
  'surrogate': '{{ "\\ud800" }}',
  'unfinished': '{% for',
  'code': "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  'huge': "{{ 'a' * 17000000 }}",
}


@pytest.mark.parametrize('name', BROKEN)
def test_templates_that_fail_are_refused_in_one_line(name):
  tokenizer = tiny_tokenizer(BROKEN[name])
  assert 'a.jsonl:2' in message_of(render, Document('a.jsonl:2', CHAT), tokenizer)
  if name in ('huge', 'unfinished'):
    message_of(encode_prompts, ['text'], tokenizer, True)


# Input that a user can correct


@pytest.mark.parametrize(
  ('name', 'content', 'place'),
  [
    ('a.jsonl', b'{"text": "x"}\n\n{"text": \n', ':3'),
    ('a.jsonl', b'{"text": "x"}\n{"text": "\xff"}\n', ':2'),
    ('a.jsonl', b'{"body": "x", "id": 1}\n', ':1'),
    ('a.jsonl', b'{"text": "\\ud83d"}\n', ':1'),
    ('a.jsonl', b'{"messages": [{"from": "human", "text": "x"}]}', ':1'),
    ('a.jsonl', b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', ':1'),
    ('a.jsonl', b'{"text": ' + b'[' * 100_000, ':1'),
    ('a.json', b'[{"text": "x"}, 1]', ': row 2'),
    ('a.txt', b'abc\xff', ''),
    ('a.parquet', b'PAR1', ''),
    ('a.csv', b'x', ''),
  ],
)
def test_broken_files_are_refused_where_they_are_broken(tmp_path, tokenizer, name, content, place):
  (tmp_path / name).write_bytes(content)
  assert f'{tmp_path / name}{place}' in message_of(load, tmp_path / name, tokenizer)


@pytest.mark.parametrize(
  'entry',
  ['', 'nothing', './no/thing', '~/no-such-file', '/no/thing', 'no/thing.jsonl', 'no/thing.npy', 'a/b/c'],
)
def test_missing_paths_never_reach_the_hub(monkeypatch, entry):
  monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: pytest.fail('asked the hub'))
  message_of(check_source, (entry,), FIELD, **NAMES)


def test_sources_that_hold_nothing_or_a_npy_file_beside_others(tmp_path, tokenizer):
  message_of(load, (), tokenizer)
  message_of(check_source, (str(tmp_path),), FIELD, **NAMES)
  path = write_texts(tmp_path / 'a.jsonl', ['The dog.'])
  count = len(stream(tokenizer, ['The dog.']))
  message = message_of(load, path, tokenizer, length=count + 1)
  assert FIELD in message and f'{count} tokens' in message and f' {count + 1} ' in message
  np.save(tmp_path / 'a.npy', np.zeros((1, 8), np.int32))
  message_of(load, [path, tmp_path / 'a.npy'], tokenizer)


def test_check_source_reads_the_first_row_only(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "x"}\nnot JSON\n')
  (tmp_path / 'empty.jsonl').write_text('')
  check_source((str(path), str(tmp_path / 'empty.jsonl')), FIELD, **NAMES)
  message_of(check_source, (str(path),), FIELD, **(NAMES | {'text_field': 'body'}))


# Draws for calibration


def test_a_row_of_a_document_lies_anywhere_in_it_and_short_ones_have_none():
  lengths = np.array([9, 7, *range(8, 60)] * 8)
  ends = np.cumsum(lengths)
  of_document = np.repeat(np.arange(len(lengths)), lengths)
  stream = windows.TokenStream(np.arange(ends[-1], dtype=np.int32), np.ones(ends[-1], bool), ends)
  rows = stream.spans(8, 0, FIELD)
  assert rows.documents == len(lengths) and rows.targets[:, 1:].all() and not rows.targets[:, 0].any()
  np.testing.assert_array_equal(rows.tokens, rows.tokens[:, :1] + np.arange(8))
  drawn_from = of_document[rows.tokens]
  assert drawn_from[:, 0].tolist() == drawn_from[:, -1].tolist() == np.flatnonzero(lengths >= 8).tolist()
  places = rows.tokens[:, 0] - (ends - lengths)[drawn_from[:, 0]]
  assert places.min() == 0 and places.max() > 40
  assert stream.spans(8, 0, FIELD).digest() == rows.digest() != stream.spans(8, 1, FIELD).digest()


def test_of_every_draw_each_source_has_its_share():
  sizes = 30, 50, 8
  parts = [Blocks(np.full((n, 4), i), np.ones((n, 4), bool), 1) for i, n in enumerate(sizes)]
  blocks = windows.mixed('abc', parts, (2, 1, 1))
  draws = [blocks.draw(10, 1, step) for step in range(12)]
  for rows in draws:
    assert len(set(rows.tolist())) == 10
    assert np.bincount(blocks.tokens[rows, 0]).tolist() == [5, 3, 2]
  assert len({tuple(sorted(rows)) for rows in draws}) == 12
  np.testing.assert_array_equal(blocks.draw(10, 1, 5), draws[5])
  assert "10 rows of 'c'" in message_of(blocks.draw, 40, 1, 0)
  assert windows.quotas((1, 1, 1), 8) == [3, 3, 2] and windows.quotas((0.5, 0.5), 3) == [2, 1]


def test_rows_drawn_are_distinct_and_fresh_at_each_step():
  draws = [draw_rows(100, 30, 1, step) for step in range(20)]
  assert all(len(set(rows)) == 30 and rows.dtype == np.int64 for rows in draws)
  assert len({tuple(sorted(rows)) for rows in draws}) == 20
  np.testing.assert_array_equal(draw_rows(100, 30, 1, 5), draws[5])
  assert set(draw_rows(100, 30, 2, 5)) != set(draws[5])
  assert set(np.concatenate(draws)) == set(range(100))
  np.testing.assert_array_equal(draw_rows(100, 100, 1, 5), np.arange(100))
  message_of(draw_rows, 100, 101, 1, 0)
