"""prune.target as it is written: what it limits, and what is refused."""

import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.targets import parse
from adapt_jax.configs import base
from adapt_jax.pipeline.schedule import target_cost
from adapt_jax.pruning.budget import Budget, Measured
from tests.support.helpers import refused

# As written -> the text in messages, kind, value, whether it is a fraction, type of file.
FORMS = {
  0.8: ('0.8', 'params', 0.8, True, ''),
  1: ('1', 'params', 1.0, True, ''),
  110_602_944: ('110602944', 'params', 110_602_944.0, False, ''),
  '110_602_944': ('110602944', 'params', 110_602_944.0, False, ''),
  '100M': ('100000000', 'params', 1e8, False, ''),
  '1.5b': ('1500000000', 'params', 1.5e9, False, ''),
  '0.5kv': ('0.5kv', 'kv_cache', 0.5, True, ''),
  '4096 KV'.replace(' ', ''): ('4096kv', 'kv_cache', 4096.0, False, ''),
  '0.70flops': ('0.7flops', 'flops', 0.7, True, ''),
  '0.7memory': ('0.7memory', 'memory', 0.7, True, ''),
  '0.7latency': ('0.7latency', 'latency', 0.7, True, ''),
  '0.5ms': ('0.5ms', 'latency', 0.5, False, ''),
  '20tok/s': ('20tok/s', 'decode', 20.0, False, ''),
  '600mb': ('600MB', 'file', 600.0, False, ''),
  '0.5GB@Q4_K_M': ('0.5GB@q4_k_m', 'file', 500.0, False, 'Q4_K_M'),
}


@pytest.mark.parametrize('written', FORMS)
def test_forms(written):
  found = parse(written)
  assert (found.text, found.kind, found.value, found.share, found.type) == FORMS[written]
  assert parse(found.text) == found  # as in reports, and in the names of directories


BAD = (
  '',
  '0',
  '-0.5',
  'nan',
  'inf',
  '600XB',
  '12 m s',
  '0.5kv@q8_0',
  '600MB@q9',
  '1e999',
  'MB',
  '._',
  True,
  None,
)


@pytest.mark.parametrize('written', BAD)
def test_what_is_no_target_is_refused_with_the_forms(written):
  message = refused(from_dict, {'prune': {'target': written}})
  assert message.startswith(f'prune.target = {written!r}')


def test_channels_are_kept_in_whole_blocks_of_the_file():
  assert from_dict({}).prune.multiples.ffn == 32  # of Q8_0, which is written later
  for target, multiple in {'600MB': 1, '600MB@q8_0': 32, '600MB@q4_k_m': 256}.items():
    assert from_dict({'prune': {'target': target, 'align_ffn': 1}}).prune.multiples.ffn == multiple


def test_advice_of_speeds_is_the_other_way_round():
  """More tokens a second are a smaller model."""
  for kind, target, advice in ('decode', '1tok/s', 'a larger one'), ('latency', '1000ms', 'a smaller one'):
    costs = Budget(kind, 10**10, (), 10**10, Measured({'batch': 1}, {}))  # 10 ms
    assert refused(target_cost, costs, target).endswith(f'ask for {advice}')


def test_several_are_a_tuple_and_one_is_itself():
  """In a recipe, whose field takes numbers, texts and tuples; on the command line they are one text."""
  config = base.get_config()
  for given, wanted in {
    '0.9, 0.8': (0.9, 0.8), (0.9, '600MB@Q8_0'): (0.9, '600MB@q8_0'), ('0.5',): 0.5, '100M': 1e8,
  }.items():  # fmt: skip
    config.prune.target = given
    assert from_dict(config.to_dict()).prune.target == wanted
  options = from_dict({'prune': {'target': '0.9,0.8'}})
  assert 'only modes prune, accel and estimate' in refused(lambda: options.prune.limit)
