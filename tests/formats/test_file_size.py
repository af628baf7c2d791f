"""Targets in MB: the counted bytes of a file are those of the file that is written."""

import functools

import pytest

from adapt_jax.config.values import GGUF_TYPES, K_QUANTS
from adapt_jax.export.gguf import write_gguf
from adapt_jax.export.gguf_quantise import quantise
from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape
from adapt_jax.pruning import file_size
from adapt_jax.pruning.attention_units import KV_GROUPS, QUERY_HEADS
from tests.support.helpers import random_params, tiny_config
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.tokenizers_for_tests import tiny_tokenizer

# 5 M parameters. Rows of 256 and 512 weights are whole blocks of K-quants; those of 288 and 544 are not.
LAYERS, FULL = 9, LayerShape(4, 2, 768)
weights = functools.cache(random_params)
KINDS = [pytest.param(kind, marks=needs_llama_cpp) if kind in K_QUANTS else kind for kind in GGUF_TYPES]


def make(hidden, shapes, tied):
  fields = {'vocab_size': 330, 'hidden_size': hidden, 'head_dim': 64, 'tie_embeddings': tied}
  return tiny_config('llama', shapes, **fields)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('hidden, tied', [(256, True), (288, False)])
def test_a_gguf_file_has_the_bytes_that_were_counted(tmp_path, kind, hidden, tied):
  """Of a dense model, and of one whose layers are narrower, some with rows that are no whole blocks."""
  small = [LayerShape(2, 1, 544), LayerShape(4, 2, 512), FULL] * 3
  dense = make(hidden, (FULL,) * LAYERS, tied)
  counted = file_size.gguf(dense, kind)
  for shapes in ((FULL,) * LAYERS, tuple(small)):
    config = make(hidden, shapes, tied)
    file = tmp_path / 'model.gguf'
    plain = kind if kind not in K_QUANTS else 'BF16'
    write_gguf(config, weights(config), file, tokenizer=tiny_tokenizer(), kind=plain, name='tiny')
    if kind in K_QUANTS:
      quantise(file, file := tmp_path / 'quantised.gguf', kind)
    cost = counted.cost([s.num_kv_heads for s in shapes], [s.ffn for s in shapes])
    assert cost == pytest.approx(file.stat().st_size, rel=0.01)
    by_heads = file_size.gguf(config, kind, QUERY_HEADS)
    assert by_heads.dense == file_size.gguf(config, kind, KV_GROUPS).dense == cost


def test_a_safetensors_file_has_the_bytes_that_were_counted(tmp_path):
  config = make(256, (FULL,) * LAYERS, True)
  write_hf(config, random_params(config), tmp_path / 'hf', tokenizer=tiny_tokenizer())
  written = (tmp_path / 'hf/model.safetensors').stat().st_size
  assert file_size.hf(config, 4).dense == pytest.approx(written, rel=0.001)
