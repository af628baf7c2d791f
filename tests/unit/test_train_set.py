"""Rows of training: windows and padded documents with segments, mixing by weight, and their order."""

import json

import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.configs import base
from adapt_jax.data import train_set
from adapt_jax.data.order import Order
from adapt_jax.data.train_set import open_train_set
from adapt_jax.models.errors import InputError
from tests.support.tokenizers_for_tests import tiny_tokenizer

T = 8
DOCUMENTS = ['The dog sleeps.', 'It was the worst of times.', 'Two', 'and three: 5 café 😀', 'The lazy dog.']


@pytest.fixture(scope='module')
def tokenizer():
  return tiny_tokenizer()


@pytest.fixture
def open_set(tmp_path, tokenizer):
  """open_set(sources, **train fields): the train set of lists of texts, each written to a file of its own."""

  def open_set(*sources, batch=2, seed=0, vocab_size=320, **fields):
    names = []
    for index, texts in enumerate(sources):
      if isinstance(texts, list):
        path = tmp_path / f'{index}.jsonl'
        rows = [{'messages' if isinstance(x, list) else 'text': x} for x in texts]
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
        names.append(str(path))
      else:
        names.append(texts)
    config = base.get_config()
    config.data.cache = str(tmp_path / 'cache')
    config.train.update(source=tuple(names), length=T, tokens=100, batch=batch, micro_batch=batch)
    config.train.update(fields)
    o = from_dict(config.to_dict())
    return open_train_set(o.train, o.data, tokenizer, vocab_size, seed)

  return open_set


def ids_of(tokenizer, text):
  return [*tokenizer(text)['input_ids'], tokenizer.eos_token_id]


def all_rows(data):
  return data.read(np.arange(len(data)))


def test_packed_windows_have_a_segment_a_document(open_set, tokenizer):
  """Across entries too; ids count from 1 in each row, and no first token of a document is a target."""
  tokens, targets, segments = all_rows(open_set(DOCUMENTS[:2], DOCUMENTS[2:]))
  assert (tokens.dtype, targets.dtype, segments.dtype) == (np.int32, np.bool_, np.int32)
  stream = [(i, n, at) for n, text in enumerate(DOCUMENTS) for at, i in enumerate(ids_of(tokenizer, text))]
  rows = len(stream) // T
  assert rows == len(tokens) > 3
  for row in range(rows):
    window = stream[row * T : (row + 1) * T]
    assert tokens[row].tolist() == [i for i, _, _ in window]
    assert segments[row].tolist() == [n - window[0][1] + 1 for _, n, _ in window]
    assert targets[row].tolist() == [at > 0 and place > 0 for place, (_, _, at) in enumerate(window)]
  assert segments.max() > 1


def test_padded_rows_are_documents(open_set, tokenizer):
  tokens, targets, segments = all_rows(open_set(DOCUMENTS[:2], DOCUMENTS[2:], layout='padded'))
  assert len(tokens) == len(DOCUMENTS)
  for row, text in enumerate(DOCUMENTS):
    ids = ids_of(tokenizer, text)[:T]
    missing = T - len(ids)
    assert tokens[row, : len(ids)].tolist() == ids
    assert segments[row].tolist() == [1] * len(ids) + [0] * missing
    assert targets[row].tolist() == [False] + [True] * (len(ids) - 1) + [False] * missing
  assert (segments == 0).any() and (segments[:, -1] == 1).any()


def test_texts_without_a_token_to_predict(open_set):
  with pytest.raises(InputError, match='no token to predict'):
    open_set([[{'role': 'user', 'content': 'and?'}]] * 3)


def test_blocks_of_a_file_are_rows_of_one_segment(open_set, tmp_path):
  path = str(tmp_path / 'a.npy')
  np.save(path, np.arange(24, dtype=np.int64).reshape(3, T))
  tokens, targets, segments = all_rows(open_set(path))
  assert tokens.tolist() == np.arange(24).reshape(3, T).tolist() and tokens.dtype == np.int32
  assert (segments == 1).all() and targets[:, 1:].all() and not targets[:, 0].any()
  for fields in ({'length': 4}, {'vocab_size': 23}):
    with pytest.raises(InputError, match='train.source'):
      open_set(path, **fields)


def test_blocks_beyond_those_checked_at_the_start_are_checked_when_read(open_set, tmp_path, monkeypatch):
  monkeypatch.setattr(train_set, '_LEAST_TOKENS', 2 * T)
  rows = np.zeros((4, T), np.int64)
  rows[3, 5] = 320
  np.save(tmp_path / 'a.npy', rows)
  data = open_set(str(tmp_path / 'a.npy'))
  data.read(np.array([0, 2]))
  with pytest.raises(InputError, match='token id 320'):
    data.read(np.array([3]))


def test_sources_without_a_row(open_set):
  for sources, fields in (([['Two']], {'length': 100}), ([[], DOCUMENTS], {'weights': (1.0, 1.0)})):
    with pytest.raises(InputError, match='0.jsonl has not one row'):
      open_set(*sources, **fields)


def test_no_more_rows_than_asked_for_and_the_same_whatever_is_on_disk(open_set, monkeypatch):
  monkeypatch.setattr(train_set, '_LEAST_TOKENS', 0)
  for layout in ('packed', 'padded'):
    few = all_rows(open_set(DOCUMENTS * 9, layout=layout, tokens=10 * T))
    assert len(few[0]) == 10
    assert len(all_rows(open_set(DOCUMENTS * 9, layout=layout, tokens=40 * T))[0]) == 40
    again = all_rows(open_set(DOCUMENTS * 9, layout=layout, tokens=10 * T))
    for a, b in zip(few, again, strict=True):
      np.testing.assert_array_equal(a, b)


def test_weights_mix_sources_and_small_ones_repeat(open_set, tokenizer):
  """The first has most rows; with 1:3 it makes up a quarter of those seen. One of weight 0 is not read."""
  sources = ['The'] * 40, ['dog'] * 12
  weighted = open_set(*sources, 'nothing.jsonl', weights=(1.0, 3.0, 0.0), batch=8)
  first = (len(ids_of(tokenizer, 'The')) * 40) // T
  seen = [weighted.rows(step) for step in range(64)]
  assert {(rows < first).sum() for rows in seen} == {2}
  small = np.concatenate(seen)[np.concatenate(seen) >= first]
  count = len(weighted) - first
  epochs = small[: len(small) // count * count].reshape(-1, count)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(first + np.arange(count), (len(epochs), 1)))
  assert len({tuple(epoch) for epoch in epochs}) > 1
  the, dog = (ids_of(tokenizer, word)[1] for word in ('The', 'dog'))
  tokens, _, _ = weighted.read(seen[0])
  assert [(the in row, dog in row) for row in tokens] == [(row < first, row >= first) for row in seen[0]]


# The order of rows


def order(counts, weights=(1.0,), **kw):
  return Order(counts, weights, **({'batch': 4, 'seed': 7} | kw))


@pytest.mark.parametrize(('rows', 'batch'), [(10, 4), (12, 4), (3, 8), (1, 1), (1000, 60)])
def test_epochs_visit_each_row_once(rows, batch):
  steps = 6 * rows // np.gcd(rows, batch)
  found = [order([rows], batch=batch).rows(step) for step in range(steps)]
  assert all(o.shape == (batch,) and o.dtype == np.int64 for o in found)
  epochs = np.concatenate(found).reshape(-1, rows)
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(rows), (len(epochs), 1)))
  assert rows < 10 or len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_batches_depend_on_seed_and_step_alone():
  ours = order([100])
  forward = [ours.rows(step) for step in range(40)]
  backward = [order([100]).rows(step) for step in reversed(range(40))][::-1]
  np.testing.assert_array_equal(forward, backward)
  other = order([100], seed=8)
  assert (np.array(forward) != np.array([other.rows(step) for step in range(40)])).mean() > 0.9


def test_an_order_of_a_large_set_has_no_pattern():
  ours = order([10**9 + 7], batch=4096)
  rows = np.concatenate([ours.rows(step) for step in (0, 1, 10**5)])
  assert len(set(rows)) == len(rows) and rows.min() >= 0 and rows.max() < 10**9 + 7
  assert abs(rows.mean() / 10**9 - 0.5) < 0.02
  assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.04


def test_weights_hold_in_every_batch_and_in_the_long_run():
  weights = (0.5, 0.3, 0.15, 0.05, 1e-7)
  ours = order([10**6] * 5, weights, batch=1000)
  groups = np.array([np.bincount(ours.rows(step) // 10**6, minlength=5) for step in range(66)])
  np.testing.assert_allclose(groups[:, :4], np.tile(1000 * np.array(weights[:4]), (66, 1)), atol=4)
  assert groups[:, 4].sum() == 1  # rare, not never
  np.testing.assert_allclose(groups.mean(0)[:4], 1000 * np.array(weights[:4]), atol=0.5)


def test_the_digest_tells_texts_apart(open_set):
  same, again = open_set(DOCUMENTS).digest(), open_set(DOCUMENTS).digest()
  assert same == again
  assert open_set(['The cat sleeps.', *DOCUMENTS[1:]]).digest() != same
  assert open_set([*DOCUMENTS, 'One more that is longer than a row.']).digest() != same
