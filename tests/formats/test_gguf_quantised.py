"""Files quantised by llama.cpp itself: read as llama.cpp computes with them."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from adapt_jax.export.gguf import write_gguf
from adapt_jax.models.config import LayerShape
from adapt_jax.models.formats.gguf_header import TENSOR_TYPES, open_file
from adapt_jax.models.formats.hf_weights import leaves
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import logits, random_params, random_tokens, tiny_config
from tests.support.llama_cpp import Job, ask, needs_llama_cpp, quantise
from tests.support.tokenizers_for_tests import tiny_tokenizer

pytestmark = needs_llama_cpp
# Rows of K-quants are whole blocks of 256 weights.
CONFIG = tiny_config(
  'llama', (LayerShape(4, 2, 512),) * 3, vocab_size=330, hidden_size=256, head_dim=64, tie_embeddings=False
)
# What llama-quantize takes -> a type that its file holds.
KINDS = {
  'Q5_0': 'Q5_0', 'Q5_1': 'Q5_1', 'Q2_K': 'Q2_K', 'Q3_K_M': 'Q3_K', 'Q4_K_M': 'Q4_K', 'Q5_K_M': 'Q5_K',
  'Q6_K': 'Q6_K',
}  # fmt: skip


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A file of each kind, and what llama.cpp makes of it in F32."""
  path = tmp_path_factory.mktemp('quantised')
  write_gguf(
    CONFIG, random_params(CONFIG), path / 'F32.gguf', tokenizer=tiny_tokenizer(), kind='F32', name='tiny'
  )
  for kind in KINDS:
    quantise(path / 'F32.gguf', path / f'{kind}.gguf', f'MOSTLY_{kind}')
    quantise(path / f'{kind}.gguf', path / f'{kind} in F32.gguf', 'ALL_F32')
  return path


@pytest.fixture(scope='module')
def answers(files):
  rows = random_tokens(CONFIG)
  return rows, ask({kind: Job(files / f'{kind}.gguf', [], rows) for kind in KINDS})


@pytest.mark.parametrize('kind', KINDS)
def test_weights_are_those_of_llama_cpp(kind, files):
  path = files / f'{kind}.gguf'
  held = {TENSOR_TYPES[tensor.type].name for tensor in open_file(path).tensors.values()}
  source, wanted = open_source(str(path)), open_source(str(files / f'{kind} in F32.gguf'))
  assert KINDS[kind] in held and source.config == wanted.config == CONFIG
  assert {tensor.type for tensor in open_file(wanted.path).tensors.values()} == {int(Type.F32)}
  for leaf in leaves(CONFIG):
    theirs = wanted.reader.read(leaf.name)
    np.testing.assert_allclose(source.reader.read(leaf.name), theirs, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_those_of_llama_cpp(kind, files, answers):
  """Up to llama.cpp's rounding of activations to eight bits."""
  rows, found = answers
  params = open_source(str(files / f'{kind}.gguf')).load_params()
  ours = np.asarray(logits(CONFIG, params, rows))
  assert np.abs(ours - found[kind].logits).mean() < 0.1 * ours.std()


@pytest.mark.parametrize('kind', KINDS)
def test_a_part_is_that_of_the_whole(kind, files):
  """Parts begin and end inside blocks."""
  tensors = open_source(str(files / f'{kind}.gguf')).reader
  for leaf in leaves(CONFIG):
    whole = tensors.read(leaf.name)
    part = tuple(slice(n // 5, n - n // 7) for n in whole.shape)
    np.testing.assert_array_equal(tensors.read(leaf.name, part), whole[part], err_msg=leaf.name)
