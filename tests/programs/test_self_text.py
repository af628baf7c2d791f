"""Rows that a model has written itself: drawn from its distribution, the same for the same seed, kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.generation import self_text
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import llama
from adapt_jax.pipeline.inputs import prepare
from tests.support import runs
from tests.support.helpers import UNIFORM, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

ROWS, LENGTH = 24, 48


def draw(files, directory, seed=(0, 0), tokenizer=None):
  source = open_source(str(files / 'model'))
  tokenizer = tokenizer or source.load_tokenizer()
  path = self_text.draw(
    source, tokenizer, ROWS, LENGTH, seed=list(seed), dtype=jnp.float32, directory=directory
  )
  return np.load(path, allow_pickle=False)


def test_rows_follow_the_models_own_distribution(files, tmp_path):
  tokens = draw(files, tmp_path, tokenizer=tiny_tokenizer(chat_template=None))
  assert tokens.shape == (ROWS, LENGTH) and tokens.dtype == np.int32
  tokens = tokens[::2]  # the others have a beginning that was not drawn
  source = open_source(str(files / 'model'))
  logits = llama.apply(source.config, source.load_params(jnp.float32), jnp.asarray(tokens))[:, :-1]
  log_p = np.asarray(jax.nn.log_softmax(logits))
  entropy = -(np.exp(log_p) * log_p).sum(-1)
  surprise = -np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
  # A drawn token surprises by the entropy on average; the likeliest ones by less, uniform ones by more.
  difference = surprise - entropy
  assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)
  assert difference.std() > 0.1 and entropy.mean() < 0.97 * np.log(source.config.vocab_size)


@pytest.mark.parametrize('template', [None, '{% for m in messages %}<s>{{ m.content }}{% endfor %}'])
def test_rows_of_a_gemma_begin_with_bos(template):
  tokenizer = tiny_tokenizer(chat_template=template)
  asked = {'rows': 6, 'length': 8, 'seed': [0]}
  starts = {}
  for family in ('llama', 'gemma3_text'):
    config = tiny_config(family, UNIFORM, vocab_size=len(tokenizer))
    starts[family] = [x for batch in self_text._batches(tokenizer, config, **asked) for x in batch.starts]
  assert len({start[0] for start in starts['llama']}) > 1
  assert {start[0] for start in starts['gemma3_text']} == {tokenizer.bos_token_id}
  gemmas, llamas = (of[::2] for of in (starts['gemma3_text'], starts['llama']))
  assert [start[1:] for start in gemmas] == llamas  # the drawn tokens; every other row may be a chat


def test_equal_seeds_give_equal_rows_which_are_kept_while_they_are_undamaged(
  files, tmp_path, monkeypatch, capsys
):
  first = draw(files, tmp_path)
  (path,) = tmp_path.glob('*.npy')
  prefix = open_source(str(files / 'model')).load_tokenizer()('<|im_start|>user\n', add_special_tokens=False)
  users = first[1::2, : len(prefix['input_ids'])]
  assert (users == prefix['input_ids']).all()  # every other row begins as a user's turn
  assert len(set(first[::2, 0].tolist())) > ROWS // 4 and len(np.unique(first[1::2], axis=0)) == ROWS // 2
  with monkeypatch.context() as patch:
    patch.setattr(self_text, 'load_source', None)  # kept: nothing is loaded
    np.testing.assert_array_equal(draw(files, tmp_path), first)
  data = bytearray(path.read_bytes())
  data[-40] ^= 1
  path.write_bytes(data)
  np.testing.assert_array_equal(draw(files, tmp_path), first)
  assert 'is damaged' in capsys.readouterr().out and [*tmp_path.iterdir()] == [path]
  assert not np.array_equal(draw(files, tmp_path, seed=(0, 1)), first)


def test_a_directory_that_cannot_be_written_is_refused_before_the_model_is_read(files, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('in the way')
  monkeypatch.setattr(self_text, 'load_source', None)
  with pytest.raises(InputError, match=r'data\.cache .*name a directory'):
    draw(files, tmp_path / 'file')


def test_calibration_and_training_read_rows_of_their_own(files):
  config = runs.make_config(files)
  config.prune.calibration.source = config.train.source = ('self',)
  config.prune.calibration.length = config.train.length
  inputs = prepare(from_dict(config.to_dict()))
  assert inputs.calibration.tokens.shape == (16, 32) and len(inputs.train) == runs.TOKENS // 32
  trained = inputs.train.read(np.arange(16))[0]
  assert not (trained == inputs.calibration.tokens).all(1).any()


def beside_text(files, group='prune.calibration', **more):
  config = runs.make_config(files).to_dict()
  block = config['prune']['calibration'] if group == 'prune.calibration' else config['train']
  block.update({'source': (str(files / 'train.txt'),)} | more)
  return from_dict(config)


def test_a_share_of_calibration_is_the_models_own_text(files):
  """Its rows are generated, and a draw has its share of them; those of the file stay as they are."""
  alone = prepare(beside_text(files)).calibration
  for more in ({}, {'weights': (7.0,)}):
    both = prepare(beside_text(files, samples=8, own=0.25, **more)).calibration
    assert both.sources == ((str(files / 'train.txt'), len(alone.tokens), 0.75), ('self', 2, 0.25))
    np.testing.assert_array_equal(both.tokens[:-2], alone.tokens)
    assert (both.draw(8, 0, 0) >= len(alone.tokens)).sum() == 2
  seen = {row.tobytes() for row in alone.tokens}
  assert not any(row.tobytes() in seen for row in both.tokens[-2:])


def test_the_text_that_is_measured_does_not_depend_on_the_seed(files):
  first, second = (
    prepare(from_dict(runs.make_config(files).to_dict() | {'seed': seed, 'evaluate': {'health': True}}))
    for seed in (0, 1)
  )
  np.testing.assert_array_equal(first.evaluate['own'].tokens, second.evaluate['own'].tokens)


@pytest.mark.parametrize(
  ('group', 'more'),
  [
    ('prune.calibration', {'source': ('x.txt', 'self')}),
    ('prune.calibration', {'own': 0.5, 'length': 2049}),
    ('train', {'source': ('x.txt', 'self')}),
  ],
)
def test_own_text_is_alone_and_within_the_context(files, group, more):
  with pytest.raises(InputError, match=rf'^{group}\.'):
    prepare(beside_text(files, group, **more))
