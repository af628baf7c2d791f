"""Sizes that no model has, in a config or header of others: refused before anything of that size is built."""

import json
import shutil
import time
import tracemalloc

import gguf
import numpy as np
import pytest

from adapt_jax.models.config import MOST, LayerShape
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.hf_config import config_from_hf, config_to_hf
from adapt_jax.models.formats.source import open_config, open_source
from adapt_jax.models.network.llama import abstract_params
from tests.support import runs
from tests.support.helpers import tiny_config

RAW = config_to_hf(tiny_config(layers=(LayerShape(4, 2, 24),) * 2))
SIZES = (
  ('num_hidden_layers', 100_000),
  ('num_hidden_layers', 2**31 - 1),
  ('head_dim', 200_000_000),
  ('hidden_size', 2**30),
  ('num_attention_heads', 2**30),
  ('num_key_value_heads', 2**30),
  ('intermediate_size', 2**30),
  ('vocab_size', 2**30),
  ('sliced_from', 2**30),
  ('max_position_embeddings', 2**40),
  ('vocab_size', 10**3000),
)


def refused(function, *arguments) -> str:
  """The one line of the refusal, which costs no time and no memory."""
  tracemalloc.start()
  start = time.monotonic()
  with pytest.raises(InputError) as error:
    function(*arguments)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert time.monotonic() - start < 5 and peak < 50e6
  assert '\n' not in str(error.value) and len(str(error.value)) < 500
  return str(error.value)


@pytest.mark.parametrize('field,value', SIZES, ids=lambda x: str(x)[:20])
def test_sizes_of_a_config_that_no_model_has(field, value):
  message = refused(config_from_hf, RAW | {field: value}, 'org/name')
  assert message.startswith(f'org/name/config.json: {field} = ') and 'at most' in message


def test_a_width_of_one_layer_that_no_model_has():
  raw = RAW | {'model_type': 'adapt_llama', 'per_layer_config': {'1': {'intermediate_size': 2**30}}}
  assert 'intermediate_size = 1073741824' in refused(config_from_hf, raw, 'org/name')


def test_the_command_refuses_it_before_it_looks_at_the_weights(tmp_path):
  files = runs.make_files(tmp_path)
  shutil.copytree(files / 'model', tmp_path / 'deep')
  raw = json.loads((tmp_path / 'deep/config.json').read_text()) | {'num_hidden_layers': 100_000}
  (tmp_path / 'deep/config.json').write_text(json.dumps(raw))
  done = runs.main(files, tmp_path / 'out', f'--config.model.source={tmp_path}/deep')
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert done.stderr.splitlines()[-1].startswith(
    f'error: {tmp_path}/deep/config.json: num_hidden_layers = 100000'
  )
  assert not (tmp_path / 'out').exists()


def test_more_layers_than_the_weights_have(tmp_path):
  """No shapes are made for the most layers that a config may have."""
  files = runs.make_files(tmp_path)
  raw = json.loads((files / 'model/config.json').read_text())
  (files / 'model/config.json').write_text(json.dumps(raw | {'num_hidden_layers': MOST['num_layers']}))
  message = refused(open_source, str(files / 'model'))
  assert 'model.layers.4.' in message and '2048 layers, the weights 4' in message
  start = time.monotonic()
  # As mode estimate does.
  assert len(abstract_params(open_config(str(files / 'model')))['layers']) == MOST['num_layers']
  assert time.monotonic() - start < 5


def test_the_largest_models_are_below_the_limits():
  """LLaMA 3.1 405B, and the largest of each size among other models."""
  found = config_from_hf(
    RAW
    | {
      'num_hidden_layers': 126,
      'hidden_size': 16_384,
      'num_attention_heads': 128,
      'num_key_value_heads': 8,
      'head_dim': 576,
      'intermediate_size': 53_248,
      'vocab_size': 262_144,
      'max_position_embeddings': 10_485_760,
    },
    'org/name',
  )
  assert all(
    4 * getattr(found, name) < MOST[name] for name in ('num_layers', 'hidden_size', 'head_dim', 'vocab_size')
  )
  assert 16 * found.layers[0].ffn < MOST['ffn'] and 16 * found.layers[0].num_heads < MOST['num_heads']


def write_gguf(path, rows=40, **fields):
  """A header with two layers whose fields are changed; None leaves one out."""
  writer = gguf.GGUFWriter(path, 'llama')
  given = {
    'embedding_length': 64,
    'block_count': 2,
    'context_length': 512,
    'feed_forward_length': 96,
    'attention.head_count': 4,
    'attention.key_length': 16,
  } | fields
  for name, value in given.items():
    if value is not None:
      writer.add_uint32(f'llama.{name}', value)
  writer.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
  writer.add_tensor('token_embd.weight', np.zeros((rows, 64), np.float32))
  writer.add_tensor('output_norm.weight', np.zeros(64, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize(
  'field,value',
  [
    ('embedding_length', 0),
    ('embedding_length', 2**32 - 1),
    ('block_count', 100_000),
    ('context_length', 0),
    ('feed_forward_length', 2**32 - 1),
    ('attention.head_count', 2**32 - 1),
    ('attention.head_count_kv', 2**32 - 1),
    ('attention.key_length', 200_000_000),
    ('rope.dimension_count', 200_000_000),
  ],
)
def test_sizes_of_a_gguf_header_that_no_model_has(tmp_path, field, value):
  path = tmp_path / 'model.gguf'
  write_gguf(path)
  open_config(str(path))
  path.unlink()
  others = {'attention.key_length': None} if field == 'rope.dimension_count' else {}
  write_gguf(path, **others | {field: value})
  for read in (open_config, open_source):
    message = refused(read, str(path))
    assert message.startswith(f'{path}: ') and f'{value:,}'.replace(',', '') in message.replace(',', '')


def test_an_embedding_length_of_zero_without_a_head_dimension(tmp_path):
  write_gguf(tmp_path / 'model.gguf', embedding_length=0, **{'attention.key_length': None})
  assert 'head dimension of 0' in refused(open_source, str(tmp_path / 'model.gguf'))
