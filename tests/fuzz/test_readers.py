"""Damaged files of others are read as before or refused in one line; no code is run and no file is added.

A changed number in a config.json or a changed letter in a text is another valid file. Of files whose parts
must fit together, such as the headers of weights, all that is read must be as it was.
"""

import json
import pathlib
import shutil

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from adapt_jax.data.documents import read_documents
from adapt_jax.export.hf import write_hf
from adapt_jax.export.writer import lineage
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.hf_weights import host_tensors, save_params
from adapt_jax.models.formats.safetensors import INDEX_NAME
from adapt_jax.models.formats.source import open_source
from tests.formats.test_gguf_model import add_byte_level, write_model
from tests.formats.test_gguf_model import tiny_config as gguf_config
from tests.support.helpers import random_params, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer

ODD = st.sampled_from((None, [], {}, 'x', -1, 0, 2**31, 10**400, 0.5, float('nan'), '\ud800')) | st.integers()
FIELDS = {'text_field': 'text', 'messages_field': 'messages'}


@st.composite
def bytes_damage(draw, end: int):
  """A function that changes, removes or adds a few of the first `end` bytes, or cuts there."""
  at, size = draw(st.integers(0, max(0, end - 1))), draw(st.sampled_from((1, 2, 8, 100)))
  removed, added = draw(st.sampled_from(((1, 1), (1, 1), (size, size), (size, 0), (0, size), (2**62, 0))))
  flip, filler = draw(st.integers(0, 255)), draw(st.binary(min_size=1, max_size=1))

  def damage(data: bytes) -> bytes:
    middle = bytes(byte ^ flip for byte in data[at : at + 1]) if added == 1 else filler * added
    return data[:at] + middle + data[at + removed :]

  return damage


@st.composite
def json_damage(draw):
  """A function that sets, removes or renames a value somewhere in a tree of JSON."""
  steps = draw(st.lists(st.integers(0, 2**16), min_size=1, max_size=5))
  value, act = draw(ODD), draw(st.sampled_from(('set', 'set', 'remove', 'rename')))

  def damage(data: bytes) -> bytes:
    tree = json.loads(data)
    node = tree
    for i, step in enumerate(steps):
      keys = sorted(node) if isinstance(node, dict) else range(len(node))
      key = keys[step % len(keys)]
      if i + 1 == len(steps) or not isinstance(node[key], dict | list) or not node[key]:
        break
      node = node[key]
    if act == 'rename' and isinstance(node, dict):
      node[f'{key}x'] = node.pop(key)
    elif act == 'remove':
      del node[key]
    else:
      node[key] = value
    return json.dumps(tree).encode()

  return damage


def outcome(read):
  """What is read, or None if one printable line refuses it."""
  try:
    return read()
  except InputError as error:
    message = str(error)
    assert message and message.isprintable() and len(message) < 2100, message
    return None


def damaged(base: pathlib.Path, name: str, damage, read):
  """The outcome of reading a copy of `base` with one damaged file; nothing else may appear beside it."""
  place = base.parent / 'copy'
  shutil.rmtree(place, ignore_errors=True)
  shutil.copytree(base, place)
  (place / name).write_bytes(damage((place / name).read_bytes()))
  before = sorted(place.parent.rglob('*'))
  found = outcome(lambda: read(place))
  assert sorted(path for path in place.parent.rglob('*') if '__pycache__' not in path.parts) == before
  return found


def weights(path: pathlib.Path):
  """The bits of all tensors by name, in Hugging Face's layout."""
  source = open_source(str(path))
  tensors = host_tensors(source.config, source.stored_params())
  return {leaf.name: (array.dtype.name, array.shape, array.tobytes()) for leaf, array in tensors}


def whole_model(path: pathlib.Path):
  """All that is read of a model, used as a run uses it."""
  source = open_source(str(path))
  tokenizer = source.load_tokenizer()
  lineage(source)
  return source.config, tokenizer('the dog, "1234" déjà vu 🙂</s>')['input_ids'], tokenizer.chat_template


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  """A pruned model in shards, with code beside it that nothing may run."""
  place, tokenizer = tmp_path_factory.mktemp('model') / 'model', tiny_tokenizer()
  config = tiny_config(vocab_size=len(tokenizer), output_bias=True)
  params = random_params(config, dtype='bfloat16')
  write_hf(config, params, place, tokenizer=tokenizer, generation={'eos_token_id': [1, 3]})
  (place / 'model.safetensors').unlink()
  save_params(config, params, place, shard_bytes=60_000)
  files = {file.name: file.stat().st_size for file in place.glob('*.safetensors')}
  origin = {'model': {'source': 'base'}, 'origin': {'source': 'base'}, 'files': files}
  (place / 'lineage.json').write_text(json.dumps(origin))
  for code in place.glob('*.py'):
    code.write_text(f"open({str(place.parent / 'ran')!r}, 'w')")
  return place


@pytest.fixture(scope='module')
def gguf(tmp_path_factory):
  place = tmp_path_factory.mktemp('gguf') / 'model'
  place.mkdir()
  write_model(
    place / 'x.gguf',
    gguf_config('llama', vocab_size=300),
    extra=lambda writer: add_byte_level(writer, 'gpt-2'),
  )
  return place


NAMES = ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'lineage.json')


@given(st.sampled_from(NAMES), st.one_of(json_damage(), bytes_damage(3000)))
def test_the_json_of_a_model(model, name, damage):
  damaged(model, name, damage, whole_model)


@given(st.data())
def test_headers_of_safetensors(model, data):
  expected = weights(model)
  files = sorted(path.name for path in model.glob('*.safetensors'))
  name = data.draw(st.sampled_from([*files, INDEX_NAME]))
  content = (model / name).read_bytes()
  end = len(content) if name == INDEX_NAME else 8 + int.from_bytes(content[:8], 'little')
  assert damaged(model, name, data.draw(bytes_damage(end)), weights) in (None, expected)


@given(st.data())
def test_the_header_of_a_gguf_file(gguf, data):
  """Its numbers, such as the base of rotary embeddings, may be others; its tensors may not."""
  content = (gguf / 'x.gguf').read_bytes()
  names = (b'general.architecture', b'token_embd.weight', b'blk.1.ffn_down.weight')
  damage = data.draw(bytes_damage(content.index(data.draw(st.sampled_from(names)))))
  read = damaged(gguf, 'x.gguf', damage, lambda path: weights(path / 'x.gguf'))
  assert read in (None, weights(gguf / 'x.gguf'))
  damaged(gguf, 'x.gguf', damage, lambda path: whole_model(path / 'x.gguf'))


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  place = tmp_path_factory.mktemp('texts') / 'texts'
  place.mkdir()
  rows = [{'text': f'the quick brown fox {i}'} for i in range(20)]
  (place / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (place / 'a.json').write_text(json.dumps(rows))
  (place / 'a.txt').write_text('the quick brown fox\n' * 20)
  parquet.write_table(pyarrow.Table.from_pylist(rows), place / 'a.parquet')
  np.save(place / 'a.npy', np.arange(64, dtype=np.int32).reshape(4, 16))
  return place


@given(st.sampled_from(('a.jsonl', 'a.json', 'a.txt', 'a.parquet')), bytes_damage(1000))
def test_texts(texts, name, damage):
  damaged(
    texts, name, damage, lambda path: list(read_documents((str(path / name),), 'train.source', **FIELDS))
  )
