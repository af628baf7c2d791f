"""What the fuzzer (tests/fuzz) has found, each with the input that showed it."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import UNIFORM, random_params, save_checkpoint, tiny_config


def refused(function, *arguments) -> str:
  """The message, one line of printable text."""
  with pytest.raises(InputError) as error:
    function(*arguments)
  message = str(error.value)
  assert message.isprintable() and message
  return message


@pytest.fixture
def model(tmp_path):
  config = tiny_config('mistral', UNIFORM)
  save_checkpoint(tmp_path / 'model', config, random_params(config))
  return tmp_path / 'model'


@pytest.mark.parametrize('name', ['a\nb', '\x1b[2J', 'a\u2028b', 'x' * 100_000])
def test_a_name_from_a_file_does_not_break_the_line(model, name):
  save_file({name: np.zeros(4, np.float32)}, model / 'model.safetensors')
  message = refused(open_source, str(model))
  assert str(model) in message and len(message) <= 2100


def test_a_long_message_keeps_its_end():
  assert str(InputError('a' * 5000 + ': lower it')).endswith(': lower it')
  assert str(InputError('Größe = 5: lower it')) == 'Größe = 5: lower it'


@pytest.mark.parametrize(
  'field,value',
  [
    ('eos_token_id', 'x'),
    ('eos_token_id', [1, '2']),
    ('eos_token_id', [[1]]),
    ('eos_token_id', 1.5),
    ('eos_token_id', {}),
    ('temperature', 'hot'),
    ('top_k', 10**400),
    ('top_p', float('nan')),
    ('repetition_penalty', -1),
  ],
)
def test_settings_of_generation_of_another_type(model, field, value):
  path = model / 'generation_config.json'
  path.write_text(json.dumps({field: value}))
  assert f'{path}: {field} = ' in refused(open_source, str(model))
  path.write_text(json.dumps({field: None}))
  open_source(str(model))
