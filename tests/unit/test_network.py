"""The decoder against PyTorch's transformers, from checkpoints that transformers wrote."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.layers import add_bias
from tests.support.helpers import logits, random_tokens, randomise

LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
LINEAR = {'rope_type': 'linear', 'rope_theta': 1000.0, 'factor': 8.0}
LOCAL = {'rope_type': 'default', 'rope_theta': 100.0}
SHAPE = {
  'vocab_size': 64,
  'hidden_size': 48,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'max_position_embeddings': 256,
  'rms_norm_eps': 1e-5,
}
GEMMA = {'head_dim': 16, 'query_pre_attn_scalar': 20, 'sliding_window': 7}
CAPS = {'attn_logit_softcapping': 4.0, 'final_logit_softcapping': 9.0}
GRANITE = {
  'embedding_multiplier': 2.5,
  'residual_multiplier': 0.6,
  'attention_multiplier': 0.4,
  'logits_scaling': 1.5,
}
CASES = {
  'llama-gqa-tied': ('Llama', {'tie_word_embeddings': True}),
  'llama-mqa': ('Llama', {'num_key_value_heads': 1}),
  'llama-wide-heads': ('Llama', {'head_dim': 20}),
  'llama3-scaling': ('Llama', {'rope_parameters': LLAMA3, 'head_dim': 16}),
  'linear-scaling': ('Llama', {'rope_parameters': LINEAR}),
  'gemma3-linear': (
    'Gemma3',
    GEMMA | {'rope_parameters': {'full_attention': LINEAR, 'sliding_attention': LOCAL}},
  ),
  'qwen2': ('Qwen2', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6}}),
  'qwen3': ('Qwen3', {'head_dim': 16}),
  'granite-biases-tied': ('Granite', GRANITE | {'attention_bias': True, 'tie_word_embeddings': True}),
  'smollm3': ('SmolLM3', {'no_rope_layers': [0, 1, 0]}),
  'smollm3-every-second': ('SmolLM3', {'no_rope_layer_interval': 2, 'attention_bias': True}),
  'phi3-window': ('Phi3', {'sliding_window': 7, 'num_key_value_heads': 6}),
  'mistral-window': ('Mistral', {'sliding_window': 7, 'head_dim': 12}),
  'gemma3': ('Gemma3', GEMMA | {'sliding_window_pattern': 2}),
  'gemma2': ('Gemma2', GEMMA | CAPS),
  'olmo2-biases': ('Olmo2', {'attention_bias': True, 'num_key_value_heads': 6}),
}


def stock_model(name, fields):
  import transformers

  kind = getattr(transformers, f'{name}ForCausalLM')
  return randomise(kind(kind.config_class(**(SHAPE | {'pad_token_id': None} | fields))))


def load(directory):
  source = open_source(str(directory))
  return source.config, source.load_params()


def assert_same_function(model, config, params, seed=0):
  import torch

  torch.set_num_threads(1)
  tokens = random_tokens(config, length=60, seed=seed)
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).logits.numpy()
  ours = np.asarray(logits(config, params, tokens))
  assert expected.std() > 1  # otherwise the tolerance below says little
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))


def test_the_gradient_of_a_bias_is_summed_over_tokens_in_fp32():
  x, bias = jnp.ones((64, 8), jnp.bfloat16), jnp.zeros(8)
  text = str(jax.make_jaxpr(jax.grad(lambda b: add_bias(x, b).sum(dtype=jnp.float32)))(bias))
  assert {*re.findall(r'(\w+)\[8\] = reduce_sum\[axes=\(0,', text)} == {'f32'}, text


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
  model = stock_model(*CASES[case])
  model.save_pretrained(tmp_path)
  assert_same_function(model, *load(tmp_path))


def test_mobilellm_is_a_llama_that_shares_its_embedding(tmp_path):
  model = stock_model('Llama', {'tie_word_embeddings': True, 'num_key_value_heads': 3})
  model.save_pretrained(tmp_path)
  raw = SHAPE | {
    'model_type': 'mobilellm',
    'architectures': ['MobileLLMForCausalLM'],
    'auto_map': {'AutoModelForCausalLM': 'modeling_mobilellm.MobileLLMForCausalLM'},
    'num_key_value_heads': 3,
    'hidden_act': 'silu',
    'attention_bias': False,
    'rope_scaling': None,
    'rope_theta': 10000.0,
    'share_embedding': True,
    'layer_sharing': False,
    'tie_word_embeddings': False,
  }
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  config, params = load(tmp_path)
  assert config.tie_embeddings and 'lm_head' not in params
  assert_same_function(model, config, params)
