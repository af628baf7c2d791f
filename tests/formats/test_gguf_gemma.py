"""Gemma 3 from GGUF, as llama.cpp's converter writes it: the function of transformers' model."""

import gguf as gguf_package
import jax
import numpy as np
import pytest

from adapt_jax.models.config import LinearScaling, RopeConfig
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.gguf_model import GgufReader
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network import llama

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
LAYERS, WINDOW, VOCAB = 7, 5, 64  # every sixth layer sees all tokens
NAMES = {
  'model.embed_tokens': 'token_embd',
  'model.norm': 'output_norm',
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'post_attention_layernorm': 'post_attention_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'post_feedforward_layernorm': 'post_ffw_norm',
}


@pytest.fixture(scope='module')
def model():
  torch.manual_seed(0)
  config = transformers.Gemma3TextConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW,
    max_position_embeddings=128, attn_implementation='eager',
  )  # fmt: skip
  made = transformers.Gemma3ForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in made.parameters():
      parameter.copy_(0.3 * torch.randn_like(parameter))
  return made


def write(model, path, **fields):
  writer = gguf_package.GGUFWriter(path, 'gemma3')
  writer.add_context_length(128)
  writer.add_embedding_length(32)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(48)
  writer.add_head_count(4)
  writer.add_head_count_kv(1)
  writer.add_key_length(16)
  writer.add_value_length(16)
  writer.add_layer_norm_rms_eps(1e-6)
  writer.add_rope_freq_base(1e6)
  writer.add_sliding_window(WINDOW)
  for key, value in fields.items():
    getattr(writer, f'add_{type(value).__name__.replace("int", "uint")}32')(f'gemma3.{key}', value)
  for name, tensor in model.state_dict().items():
    if name == 'lm_head.weight':  # tied
      continue
    part = name.removesuffix('.weight')
    layer = ''
    if part.startswith('model.layers.'):
      _, _, number, part = part.split('.', 3)
      layer = f'blk.{number}.'
    array = tensor.numpy() + np.float32(name.endswith('norm.weight'))  # llama.cpp's norms multiply by w
    writer.add_tensor(f'{layer}{NAMES[part]}.weight', array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_logits_are_those_of_transformers(model, tmp_path):
  """Beyond the window, over layers with and without it."""
  write(model, tmp_path / 'gemma.gguf')
  source = open_source(str(tmp_path / 'gemma.gguf'))
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 24)).astype(np.int32)
  ours = jax.jit(lambda p: llama.apply(source.config, p, tokens))(source.load_params(np.float32, None))
  with torch.no_grad():
    theirs = model(torch.from_numpy(tokens).long()).logits
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert [shape.window for shape in source.config.layers] == [WINDOW] * 5 + [0, WINDOW]


@pytest.mark.parametrize(
  'key, value',
  [
    ('attention.sliding_window_pattern', 3),
    ('rope.freq_base_swa', 2e4),
    ('final_logit_softcapping', 30.0),
  ],
)
def test_what_would_change_the_function_is_refused(key, value, model, tmp_path):
  write(model, tmp_path / 'gemma.gguf', **{key: value})
  with pytest.raises(InputError, match=f'gemma3.{key} = {value}'):
    GgufReader(tmp_path / 'gemma.gguf')


def test_linear_scaling_is_that_of_layers_without_a_window(model, tmp_path):
  write(model, tmp_path / 'gemma.gguf', **{'rope.scaling.factor': 8.0})
  config = GgufReader(tmp_path / 'gemma.gguf').config
  assert config.rope.scaling == LinearScaling(8.0) and config.local_rope == RopeConfig(1e4)


def test_what_only_says_the_usual_is_read(model, tmp_path):
  usual = {'rope.scaling.factor': 1.0, 'attention.sliding_window_pattern': 6, 'rope.freq_base_swa': 1e4}
  write(model, tmp_path / 'gemma.gguf', **usual)
  assert GgufReader(tmp_path / 'gemma.gguf').config.layers[5].window == 0
