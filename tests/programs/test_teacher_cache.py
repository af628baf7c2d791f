"""The teacher's likeliest ids on disk: what it says itself, computed once, and after a kill the rest."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.machine import preemption
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.errors import InputError
from adapt_jax.models.network import llama
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.training.step import Teacher
from adapt_jax.training.teacher_cache import open_taught
from tests.support import runs

K, STEPS = 6, 10


@pytest.fixture(scope='module')
def files(files):
  path = files
  lines = (path / 'train.txt').read_text().splitlines()
  (path / 'train.jsonl').write_text(''.join(json.dumps({'text': line}) + '\n' for line in lines))
  return path


def make_config(files, **distill):
  config = runs.make_config(files)
  config.train.source = (str(files / 'train.jsonl'),)
  config.train.distill.update({'alpha': 1.0, 'cache': K, **distill})
  return config


class Asked:
  """Opens caches of one run in turn, and counts how often the teacher is loaded."""

  def __init__(self, files, directory):
    self.options = from_dict(make_config(files).to_dict())
    self.inputs, self.directory, self.loads = prepare(self.options), directory, 0
    self.params = self.inputs.model.load_params(jnp.float32)

  def load(self):
    self.loads += 1
    return Teacher(self.inputs.source.config, self.params)

  def open(self):
    t, compiler = self.options.train, Compiler()
    args = self.directory, self.inputs.train, t, STEPS, self.load
    return open_taught(*args, dtype=jnp.float32, compiler=compiler), compiler.counts


@pytest.fixture(scope='module')
def asked_once(files, tmp_path_factory):
  asked = Asked(files, tmp_path_factory.mktemp('asked') / 'teacher')
  assert asked.open()[1] == {'teacher': 1}
  return asked


def test_rows_come_with_what_the_teacher_says_of_them(asked_once):
  asked = asked_once
  taught, _ = asked.open()
  rows = taught.rows(STEPS - 1)
  tokens, targets, segments, ids, log_p = taught.read(rows)
  for ours, plain in zip((tokens, targets, segments), asked.inputs.train.read(rows), strict=True):
    np.testing.assert_array_equal(ours, plain)
  assert segments.max() > 1  # a token sees only its own document
  assert ids.shape == (4, 32, K) and log_p.shape == (4, 32, K + 1)
  config = asked.inputs.source.config
  x = llama.hidden_states(config, asked.params, jnp.asarray(tokens), segments=jnp.asarray(segments))
  p = np.asarray(jax.nn.softmax(x @ llama.head(asked.params).T))
  np.testing.assert_array_equal(ids, np.argsort(-p, axis=-1, kind='stable')[..., :K])
  np.testing.assert_allclose(np.exp(log_p[..., :K]), -np.sort(-p)[..., :K], rtol=5e-3)
  np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=5e-3)
  for first, again in zip((ids, log_p), asked.open()[0].read(rows)[3:], strict=True):
    np.testing.assert_array_equal(again, first)


def test_a_killed_cache_goes_on_where_it_was_and_the_teacher_is_not_asked_again(
  asked_once, files, tmp_path, monkeypatch
):
  whole = asked_once
  whole.open()
  assert whole.loads == 1  # nothing is missing
  cut, points = Asked(files, tmp_path / 'cut'), iter([False, False, True])
  with monkeypatch.context() as patch:
    patch.setattr(preemption, 'requested', lambda: next(points))
    with pytest.raises(preemption.Preempted):
      cut.open()
  count = int((tmp_path / 'cut/done').read_text())
  assert 0 < count < int((whole.directory / 'done').read_text())
  kept = cut.inputs.train.read
  monkeypatch.setattr(cut.inputs.train, 'read', lambda rows: read.append(len(rows)) or kept(rows))
  read = list[int]()
  cut.open()
  left = int((whole.directory / 'done').read_text()) - count
  assert 0 < sum(read) // 2 <= left + 4  # the last batch is padded
  for name in ('rows.npy', 'done'):
    assert (tmp_path / 'cut' / name).read_bytes() == (whole.directory / name).read_bytes()


@pytest.mark.parametrize('damage', ['unfinished', 'count', 'shorter', 'ids', 'log_p', 'text'])
def test_damaged_predictions_and_another_text_are_refused(asked_once, files, tmp_path, damage):
  shutil.copytree(asked_once.directory, tmp_path / 'teacher')
  asked = copy.copy(asked_once)
  asked.directory, rows = tmp_path / 'teacher', asked.inputs.train.rows(0)
  path = tmp_path / 'teacher/rows.npy'
  if damage == 'unfinished':
    path.unlink()
    (tmp_path / 'teacher/done').write_text('4')
  elif damage == 'count':
    (tmp_path / 'teacher/done').write_text('x')
  elif damage == 'shorter':
    path.write_bytes(path.read_bytes()[:-10])
  elif damage == 'text':
    other = make_config(files)
    other.train.source = (str(files / 'valid.txt'), str(files / 'train.txt'))
    asked.inputs = prepare(from_dict(other.to_dict()))
  else:
    told = np.load(path, mmap_mode='r+')
    told[damage].view(np.uint16)[:, 3, 0] ^= 1
    told.flush()
  with pytest.raises(InputError) as error:
    asked.open()[0].read(rows)
  assert str(tmp_path / 'teacher') in str(error.value) and asked.loads == asked_once.loads


def test_a_run_from_the_cache_learns_as_beside_the_teacher(files, tmp_path):
  """With nearly all ids kept the two differ by half precision alone."""
  vocab = prepare(from_dict(runs.make_config(files).to_dict())).config.vocab_size
  reports = {}
  for name, cache in (('beside', 0), ('cached', vocab - 2)):
    config = make_config(files, cache=cache)
    config.prune.stages, config.train.tokens = 1, 12 * 4 * 32
    reports[name] = runs.in_process(config, tmp_path / name)
  ours, beside = reports['cached'], reports['beside']
  assert ours['compiles']['teacher'] == 1 and 'teacher' not in beside['compiles']
  assert ours['texts']['text']['kl'] == pytest.approx(beside['texts']['text']['kl'], rel=0.02)
  pruned, recovered = (ours['perplexity'][name] for name in ('pruned', 'recovered'))
  assert abs(recovered - pruned) > 0.01 * pruned  # it has learned something
  assert (tmp_path / 'cached/teacher/rows.npy').exists() and not (tmp_path / 'beside/teacher').exists()


def test_more_ids_than_the_model_has_are_refused(files):
  with pytest.raises(InputError, match=r'train\.distill\.cache = 4096 must be below .* lower it'):
    prepare(from_dict(make_config(files, cache=4096).to_dict()))
