"""Tokens on disk: made once, used by all, made again when anything they depend on changes."""

import json
import os
import pathlib

import datasets
import huggingface_hub
import numpy as np
import pytest

from adapt_jax.data import token_cache, tokenise
from adapt_jax.data.token_cache import FIRST, TARGET, Need, open_cache, used_ids
from adapt_jax.models.errors import InputError
from tests.support.tokenizers_for_tests import CHATML, CHATML_DEFAULT_SYSTEM, tiny_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
ALL = Need(2**62)
CHAT = [{'role': 'user', 'content': 'What is two?'}, {'role': 'assistant', 'content': 'The sum is five.'}]
ROWS = [{'text': 'The dog sleeps.'}, {'messages': CHAT}, {'text': 'It was 😀.'}] * 20


@pytest.fixture(scope='module')
def tokenizer():
  return tiny_tokenizer()


@pytest.fixture
def source(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  return path


@pytest.fixture
def builds(monkeypatch):
  """One entry for each time that something is tokenised."""
  made, build = [], token_cache._build
  monkeypatch.setattr(token_cache, '_build', lambda *a: made.append(a) or build(*a))
  return made


def load(source, tokenizer, need=ALL, **fields):
  directory = (source.parent if isinstance(source, os.PathLike) else fields.pop('at')) / 'cache'
  names = {'text_field': 'text', 'messages_field': 'messages', 'field': 'train.source'} | fields
  return open_cache(directory, str(source), tokenizer, need, **names)


def left(source):
  """What is in the cache's directory."""
  return sorted(path.name for path in (source.parent / 'cache').iterdir())


def assert_same(a, b):
  for name in ('tokens', 'flags', 'ends'):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_holds_the_documents_and_maps_them(source, tokenizer):
  cache = load(source, tokenizer)
  starts = np.concatenate([[0], cache.ends[:-1]])
  text = tokenizer('The dog sleeps.')['input_ids'] + [tokenizer.eos_token_id]
  assert len(cache.ends) == 60 and cache.ends[-1] == len(cache.tokens) and cache.complete
  assert cache.tokens[: cache.ends[0]].tolist() == text and cache.tokens.dtype == np.uint16
  assert np.flatnonzero(cache.flags & FIRST).tolist() == starts.tolist()
  assert (cache.flags[1 : cache.ends[0]] & TARGET).all()  # after BOS
  chat = slice(*cache.ends[:2])
  marked = tokenizer.decode(cache.tokens[chat][(cache.flags[chat] & TARGET) > 0])
  assert marked == 'The sum is five.<|im_end|>\n'
  assert cache.targets == ((cache.flags & TARGET > 0) & ~(cache.flags & FIRST > 0)).sum()
  assert cache.highest == cache.tokens.max()
  assert all(isinstance(x.base, np.memmap) for x in (cache.tokens, cache.flags, cache.ends))


def test_tokenised_once(source, tokenizer, builds):
  assert_same(load(source, tokenizer), load(source, tiny_tokenizer()))
  load(source, tokenizer, Need(5))
  load(source, tokenizer, Need(0, 2))
  assert len(builds) == 1 and len(left(source)) == 1


@pytest.mark.parametrize('change', ['size', 'time', 'template', 'eos', 'tokens'])
def test_made_again_when_what_it_depends_on_changes(source, builds, change):
  load(source, tiny_tokenizer(CHATML))
  other = tiny_tokenizer(CHATML_DEFAULT_SYSTEM if change == 'template' else CHATML)
  status = source.stat()
  if change == 'size':
    source.write_text(source.read_text() + '{"text": "more"}\n')
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
  elif change == 'time':
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  elif change == 'eos':
    other.eos_token = '<|im_end|>'
  elif change == 'tokens':
    other.add_tokens(['sleeps'])
  load(source, other)
  load(source, other)
  assert len(builds) == 2


def test_reads_little_more_than_needed_and_the_same_each_time(source, tokenizer, builds, monkeypatch):
  monkeypatch.setattr(token_cache, 'BATCH_CHARS', 40)
  source.write_text(''.join(f'{{"text": "The dog sleeps {n}."}}\n' for n in range(100)))
  sizes = []
  for need in (Need(200), Need(0, 5), Need(100), Need(300), Need(0, 60)):
    cache = load(source, tokenizer, need)
    sizes.append(len(cache.ends))
    assert len(cache.tokens) >= need.tokens and len(cache.ends) >= need.documents and not cache.complete
    assert len(cache.tokens) < 350 or need.documents == 60
  monkeypatch.undo()
  whole = load(source, tokenizer)
  np.testing.assert_array_equal(whole.tokens[: len(cache.tokens)], cache.tokens)
  np.testing.assert_array_equal(whole.ends[: len(cache.ends)], cache.ends)
  assert sizes[:3] == [sizes[0]] * 3 and sizes[4] < 64  # the next two have their part in the first
  assert whole.complete and len(whole.ends) == 100


def test_a_few_refused_conversations_are_left_out_and_many_are_an_error(
  source, tokenizer, monkeypatch, capsys
):
  monkeypatch.setattr(token_cache, 'BATCH_CHARS', 20)
  rows = [{'messages': CHAT[1:]}, {'messages': CHAT}] * 2 + [{'messages': CHAT}] * 400
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for _ in range(2):  # also if the cache is there
    assert len(load(source, tokenizer).ends) == len(rows) - 2
    assert 'rejects 2 conversations' in capsys.readouterr().out
  for many in ([*rows[:2] * 20, *rows], rows[:20], rows[:1] * 300):
    source.write_text(''.join(json.dumps(row) + '\n' for row in many))
    with pytest.raises(InputError, match='are rejected'):
      load(source, tokenizer)


@pytest.mark.parametrize('damage', ['cut', 'bit', 'gone'])
@pytest.mark.parametrize('name', ['tokens', 'flags', 'ends', 'meta.json'])
def test_damaged_ones_are_made_again(source, tokenizer, builds, name, damage):
  whole = load(source, tokenizer)
  expected = [np.array(x) for x in (whole.tokens, whole.flags, whole.ends)]
  (path,) = (source.parent / 'cache').iterdir()
  data = bytearray((path / name).read_bytes())
  data[data.index(b'"highest": ') + 11 if name == 'meta.json' else len(data) // 2] ^= 1
  if damage == 'gone':
    (path / name).unlink()
  else:
    (path / name).write_bytes(data if damage == 'bit' else data[:-3])
  again = load(source, tokenizer)
  for a, b in zip((again.tokens, again.flags, again.ends), expected, strict=True):
    np.testing.assert_array_equal(a, b)
  assert len(builds) == 2 and left(source) == [path.name]


def test_the_slower_of_two_processes_uses_what_the_faster_made(source, tokenizer, monkeypatch):
  finish, entered = token_cache._Writer.finish, []

  def slow_finish(self):
    entered.append(self)
    if len(entered) == 1:  # while the first one is at its end, a second one starts and wins
      entered.append(load(source, tokenizer))
    finish(self)

  monkeypatch.setattr(token_cache._Writer, 'finish', slow_finish)
  slower = load(source, tokenizer)
  assert_same(slower, entered[2])
  assert len(left(source)) == 1 and not left(source)[0].startswith('.')


def test_nothing_half_written_is_left(source, tokenizer):
  source.write_text(source.read_text() + 'not JSON\n')
  with pytest.raises(InputError, match='a.jsonl:61'):
    load(source, tokenizer)
  assert left(source) == []


def test_what_a_killed_process_left_is_removed_once_it_is_old(source, tokenizer, monkeypatch):
  load(source, tokenizer)
  (name,) = left(source)
  (source.parent / 'cache' / name).rename(source.parent / 'cache' / f'.{name}')
  load(source, tokenizer)
  assert left(source) == [f'.{name}', name]  # it may be at work
  (source.parent / 'cache' / name / 'meta.json').unlink()  # to be made again
  monkeypatch.setattr(token_cache, '_STALE_SECONDS', 0.0)
  load(source, tokenizer)
  assert left(source) == [name]


def test_a_place_that_cannot_be_written(source, tokenizer):
  (source.parent / 'cache').write_text('a file')
  with pytest.raises(InputError, match='data.cache: .*cache'):
    load(source, tokenizer)


def test_used_ids_are_those_of_all_entries(source, tokenizer, builds):
  other, empty = source.with_name('b.txt'), source.with_name('c.txt')
  other.write_text('Zebras!')
  empty.write_text(' '[:0])
  asked = {'field': 'text', 'text_field': 'text', 'messages_field': 'messages'}
  entries = tuple(map(str, (source, other, empty)))
  parts = [load(path, tokenizer).tokens for path in (source, other)]
  assert used_ids(source.parent / 'cache', entries, tokenizer, **asked) == sorted(
    {*np.concatenate(parts).tolist()}
  )
  for _ in range(2):
    with pytest.raises(InputError, match='empty'):
      used_ids(source.parent / 'cache', (str(empty),), tokenizer, **asked)
  assert len(builds) == 3


def test_hub_data_sets_by_their_revision(tmp_path, tokenizer, builds, monkeypatch):
  revision = ['a']

  def load_dataset(*names, **options):
    return datasets.Dataset.from_list(ROWS[:1] * 5).to_iterable_dataset()

  class Info:
    sha = property(lambda self: revision[0])

  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda self, name, timeout: Info())
  for found, count in (('a', 1), ('a', 1), ('b', 2), ('a', 2)):
    revision[0] = found
    assert len(load('org/name:test', tokenizer, at=tmp_path).ends) == 5
    assert len(builds) == count
  load('org/name:train', tokenizer, at=tmp_path)
  assert len(builds) == 3


def test_a_tokenizer_that_panics_is_one_line(source, monkeypatch):
  class PanicException(BaseException):
    """As the tokenizers library raises."""

  def panic(*_):
    raise PanicException('index out of bounds\nmore')

  monkeypatch.setattr(tokenise, 'encode', panic)
  with pytest.raises(InputError, match=r'tokenizer .*a\.jsonl:1'):
    load(source, tiny_tokenizer())
