"""The windows that evaluation takes from a text, and the token that all rows begin with."""

import types

import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.data import windows
from adapt_jax.models.config import LayerShape
from adapt_jax.pipeline.loader import Loader
from tests.support.helpers import tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

POOL = 400
SHAPE = LayerShape(6, 2, 40)


@pytest.mark.parametrize(
  ('tokens', 'max_tokens', 'starts'),
  [
    (300, 30, [0, 140, 290]),  # spread over all of a text
    (1000, 30, [0, 200, POOL - 10]),  # of a longer one, over what is read, and that is said
    (1000, 0, [*range(0, 1000, 10)]),
    (1000, 700, [*range(0, 700, 10)]),
  ],
)
def test_windows_are_spread_over_what_is_read(tmp_path, monkeypatch, capsys, tokens, max_tokens, starts):
  monkeypatch.setattr(windows, 'POOL_TOKENS', POOL)
  monkeypatch.setattr('adapt_jax.pipeline.loader.POOL_TOKENS', POOL)
  np.save(tmp_path / 'text.npy', np.arange(tokens, dtype=np.int32).reshape(-1, 10))
  evaluate = {'source': [f'{tmp_path}/text.npy'], 'length': 10, 'max_tokens': max_tokens}
  source = types.SimpleNamespace(config=tiny_config(vocab_size=tokens))
  (blocks,) = Loader(from_dict({'evaluate': evaluate}), source, tiny_tokenizer()).evaluation().values()
  assert blocks.tokens[:, 0].tolist() == starts
  assert ('spread over' in capsys.readouterr().out) == (starts[-1] == POOL - 10)


def test_calibration_may_need_more_than_is_read_otherwise(tmp_path, monkeypatch):
  monkeypatch.setattr('adapt_jax.pipeline.loader.POOL_TOKENS', POOL)
  np.save(tmp_path / 'text.npy', np.random.default_rng(0).integers(5, 50, (60, 10), np.int32))
  (tmp_path / 'text.txt').write_text('the law of the union ' * 400)
  for name in ('text.npy', 'text.txt'):
    calibration = {'source': [str(tmp_path / name)], 'samples': 50, 'length': 10, 'own': 0.0}
    source = types.SimpleNamespace(config=tiny_config(vocab_size=len(tiny_tokenizer())))
    options = from_dict({'data': {'cache': f'{tmp_path}/cache'}, 'prune': {'calibration': calibration}})
    loader = Loader(options, source, tiny_tokenizer())
    assert len(set(loader.calibration().draw(50, 0, 0))) == 50


def test_rows_longer_than_the_context_are_warned_about_once(tmp_path, capsys):
  np.save(tmp_path / 'text.npy', np.ones((4, 10), np.int32))
  options = from_dict(
    {'evaluate': {'source': [f'{name}={tmp_path}/text.npy' for name in 'ab'], 'length': 10}}
  )
  for longest, warnings in ((10, 0), (9, 2)):
    source = types.SimpleNamespace(config=tiny_config(max_position=longest))
    loader = Loader(options, source, tiny_tokenizer())
    loader.evaluation()
    loader.evaluation()
    lines = capsys.readouterr().out.count('its rows of 10 tokens exceed the context of the model (9 tokens)')
    assert lines == warnings


def test_windows_within_a_long_prompt_are_not_taken():
  """Of a chat only the answers are predicted."""
  targets = np.zeros((100, 8), bool)
  targets[[10, 50, 90], 5] = True
  blocks = windows.Blocks(np.arange(800, dtype=np.int32).reshape(100, 8), targets, 1)
  for max_tokens, taken in ((8, [10]), (16, [10, 90]), (24, [10, 50, 90]), (400, [10, 50, 90])):
    found = windows.spread(blocks, max_tokens)
    assert found.tokens[:, 0].tolist() == [8 * row for row in taken] and found.targets.any(axis=1).all()
  for max_tokens in (0, 800):  # all are taken, as by a run that began with an earlier version
    assert windows.spread(blocks, max_tokens) is blocks


@pytest.mark.parametrize('layout', ['packed', 'documents'])
@pytest.mark.parametrize('family', ['qwen3', 'gemma3_text'])
def test_all_rows_of_a_gemma_begin_with_bos(tmp_path, family, layout):
  """Also those from the middle of a document. Nothing else changes, and neither do other families' rows."""
  tokenizer = tiny_tokenizer()
  path = tmp_path / 'text.jsonl'
  path.write_text('{"text": "The lazy dog sleeps. It was the worst of times."}\n' * 20)

  def rows(family):
    options = {
      'data': {'cache': str(tmp_path / 'cache')},
      'prune': {'calibration': {'source': [str(path)], 'length': 8, 'layout': layout, 'own': 0.0}},
      'train': {'source': [str(path)], 'length': 8, 'tokens': 100},
      'evaluate': {'source': [str(path)], 'length': 8},
    }
    source = types.SimpleNamespace(config=tiny_config(family, (SHAPE,) * 2, vocab_size=len(tokenizer)))
    loader = Loader(from_dict(options), source, tokenizer)
    train = loader.train_set()
    texts = {'calibration': loader.calibration(), **loader.evaluation()}
    found = {name: (x.tokens, x.targets) for name, x in texts.items()}
    return found | {'training': train.read(np.arange(len(train)))}

  usual, found = rows('llama'), rows(family)
  assert (len(found['calibration'][0]) == 20) == (layout == 'documents')  # a row from each
  for name, (tokens, *others) in found.items():
    starts = {tokenizer.bos_token_id} if family.startswith('gemma') else set(usual[name][0][:, 0])
    assert set(tokens[:, 0]) == starts, name
    for ours, theirs in zip([tokens[:, 1:], *others], [usual[name][0][:, 1:], *usual[name][1:]], strict=True):
      np.testing.assert_array_equal(ours, theirs, name)
  assert len(set(usual['training'][0][:, 0])) > 1


def test_the_model_generates_no_more_than_is_evaluated(monkeypatch):
  asked = []
  monkeypatch.setattr('adapt_jax.pipeline.loader.self_text.draw', lambda *args, **_: asked.append(args[2:4]))
  monkeypatch.setattr(Loader, 'load', lambda *args: None)
  source = types.SimpleNamespace(config=tiny_config(max_position=512))
  for max_tokens in (0, 8192, 600, 100):
    Loader(from_dict({'evaluate': {'max_tokens': max_tokens}}), source, tiny_tokenizer()).own()
  assert asked == [(16, 256), (16, 256), (2, 256), (1, 256)]
