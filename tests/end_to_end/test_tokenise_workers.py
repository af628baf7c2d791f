"""Documents tokenised by several processes."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from adapt_jax.data import tokenise
from adapt_jax.data.documents import Document
from adapt_jax.data.tokenise import encode_all
from adapt_jax.models.errors import InputError
from tests.support.tokenizers_for_tests import tiny_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHAT = [{'role': 'user', 'content': 'What is two?'}, {'role': 'assistant', 'content': 'The sum is five.'}]


@pytest.fixture(scope='module')
def tokenizer():
  return tiny_tokenizer()


def test_worker_processes_give_the_same_and_their_errors(tokenizer, monkeypatch):
  documents = [Document('', text) for text in ('The dog sleeps.', CHAT, 'It was 😀.')] * 20
  batches = [documents[i : i + 7] for i in range(0, len(documents), 7)]
  alone = list(encode_all(iter(batches), tokenizer, 1))
  monkeypatch.setattr(tokenise, '_ALONE_CHARS', 100)  # the first batch here, the others there
  broken = [Document('here', CHAT[1:])]

  def feed():
    for batch in (*batches, broken):
      # A scheduler may send it to every process, while they start or later: the run's own decides.
      for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
      yield batch

  *together, last = encode_all(feed(), tokenizer, 2)
  assert last.refused[0].startswith('here: ') and not len(last.tokens)
  assert len(together) == len(alone) > 2
  for a, b in zip(alone, together, strict=True):
    for name in ('tokens', 'targets', 'lengths'):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize('which', range(2))
def test_a_worker_process_that_is_killed_ends_it(tokenizer, monkeypatch, which):
  """As where memory runs out; the others, which ignore SIGTERM, end too."""
  monkeypatch.setattr(tokenise, '_ALONE_CHARS', 1)

  def feed():
    for n in range(1000):
      yield [Document('here', f'The dog sleeps {n}.')]
      if n == 50:
        time.sleep(0.5)  # they wait for work, one with a lock on the queue
        os.kill(multiprocessing.active_children()[which].pid, signal.SIGKILL)

  with pytest.raises(InputError, match='a tokenising process was killed'):
    list(encode_all(feed(), tokenizer, 2))
  assert not multiprocessing.active_children()


def test_worker_processes_do_not_run_the_script_again(tmp_path):
  """As a user writes one for the library: without `if __name__ == '__main__'`."""
  script = tmp_path / 'script.py'
  script.write_text(
    'from adapt_jax.data import tokenise\n'
    'from adapt_jax.data.documents import Document\n'
    'from tests.support.tokenizers_for_tests import tiny_tokenizer\n'
    'print("begun", flush=True)\n'
    'tokenise._ALONE_CHARS = 10\n'
    'batches = iter([[Document("here", "The dog sleeps.")]] * 4)\n'
    'print(len(list(tokenise.encode_all(batches, tiny_tokenizer(), 2))))\n'
    'class Own:\n'
    '  def __getattr__(self, name): return getattr(tiny_tokenizer(), name)\n'
    '  def __call__(self, *args, **options): return tiny_tokenizer()(*args, **options)\n'
    'batches = iter([[Document("here", "The dog sleeps.")]] * 4)\n'
    'print(len(list(tokenise.encode_all(batches, Own(), 2))))\n'
  )
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (0, 'begun\n4\n4\n'), done.stderr
