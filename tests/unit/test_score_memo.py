"""What runs of one process share is bounded, and found again only under the same key."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.machine.compiler import Compiler, Programs
from adapt_jax.pruning.score_memo import ScoreMemo
from adapt_jax.pruning.scores import Scores


def make_scores(value):
  zeros = np.zeros(4, np.float32)
  return Scores(zeros + value, zeros, zeros, np.float32(0))


def test_scores_are_computed_once_and_the_least_used_forgotten():
  size = sum(x.nbytes for x in make_scores(0) if x is not None)
  memo, asked = ScoreMemo(most_bytes=2 * size), []

  def get(key):
    return memo.get(key, lambda: asked.append(key) or make_scores(key)).kv[0]

  assert [get(key) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
  assert asked == [1, 2, 3, 2]  # 3 took the place of 2, which was used before 1
  assert (memo.computed, memo.remembered) == (4, 2)


def test_scores_larger_than_the_memo_are_still_given():
  assert ScoreMemo(most_bytes=1).get('a', lambda: make_scores(7)).kv[0] == 7


@dataclasses.dataclass(frozen=True)
class Add:
  amount: int

  def __call__(self, x):
    return x + self.amount


def test_equal_programs_are_compiled_once_for_all_compilers():
  programs = Programs()
  first, second = Compiler(programs), Compiler(programs)
  x = jnp.arange(3)
  assert first('add', Add(1), x)(x).tolist() == second('add', Add(1), x)(x).tolist() == [1, 2, 3]
  assert second('add', Add(2), x)(x).tolist() == [2, 3, 4]
  assert second('add', Add(1), x[:2])(x[:2]).tolist() == [1, 2]
  assert first.counts == {'add': 1} and second.counts == {'add': 2}


def test_functions_and_lone_compilers_share_nothing():
  programs, x = Programs(), jnp.arange(3)
  compiler = Compiler(programs)
  for amount in (1, 2):
    assert compiler('f', lambda x, amount=amount: x + amount, x)(x)[0] == amount
  assert compiler.counts == {'f': 2}
  alone = Compiler()
  for _ in range(2):
    alone('add', Add(1), x)
  assert alone.counts == {'add': 2}


@pytest.mark.parametrize('most', [1, 3])
def test_programs_are_bounded_by_name(most):
  programs, made = Programs(most), []
  for name in 'ab':
    for key in range(5):
      programs.get(name, key, lambda key=key: made.append(key) or key)
  before = len(made)
  assert [programs.get('a', key, lambda: None) for key in range(5 - most, 5)] == list(range(5 - most, 5))
  assert len(made) == before and programs.get('a', 0, lambda: 'anew') == 'anew'
