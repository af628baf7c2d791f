"""The windows that evaluation takes from a text."""

import types

import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.data import windows
from adapt_jax.pipeline.loader import Loader
from tests.support.tokenizers_for_tests import tiny_tokenizer

POOL = 400


@pytest.fixture
def text(tmp_path, monkeypatch):
  """A function that gives the windows of a text of this many words, if no more than POOL tokens are read."""
  monkeypatch.setattr(windows, 'POOL_TOKENS', POOL)
  monkeypatch.setattr('adapt_jax.pipeline.loader.POOL_TOKENS', POOL)
  tokenizer = tiny_tokenizer()

  def load(tokens, max_tokens):
    path = tmp_path / 'text.npy'
    np.save(path, np.arange(tokens, dtype=np.int32).reshape(-1, 10) % len(tokenizer))
    evaluate = {'source': [str(path)], 'length': 10, 'max_tokens': max_tokens}
    source = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=len(tokenizer)))
    loader = Loader(from_dict({'evaluate': evaluate}), source, tokenizer)
    return next(iter(loader.evaluation().values())).tokens[:, 0], len(tokenizer)

  return load


def test_windows_are_spread_over_all_of_a_text_that_is_read_whole(text, capsys):
  starts, size = text(tokens=300, max_tokens=30)
  assert starts.tolist() == [0, 140 % size, 290 % size]
  assert 'spread over' not in capsys.readouterr().out


def test_a_longer_text_is_said_not_to_be_read_whole(text, capsys):
  starts, size = text(tokens=1000, max_tokens=30)
  assert starts[-1] == (POOL - 10) % size
  assert (
    f'config.evaluate.source: its windows are spread over its first {POOL} tokens' in capsys.readouterr().out
  )


@pytest.mark.parametrize('max_tokens', [0, 700])
def test_all_that_is_asked_for_is_measured(text, capsys, max_tokens):
  starts, _ = text(tokens=1000, max_tokens=max_tokens)
  assert len(starts) == (max_tokens or 1000) // 10
  assert 'spread over' not in capsys.readouterr().out
