"""Changed configurations: the logits of transformers' model of the same config.json, or a refusal."""

import json
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adapt_jax.models.formats.source import open_source
from tests.support.helpers import logits, random_tokens, randomise, refused

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
LAYERS, CONTEXT = 2, 32  # rows are as long as the context: a window matters if it is shorter
SHAPE = {
  'vocab_size': 64, 'hidden_size': 48, 'intermediate_size': 40, 'num_hidden_layers': LAYERS,
  'num_attention_heads': 6, 'num_key_value_heads': 2, 'max_position_embeddings': CONTEXT,
  'rms_norm_eps': 1e-5, 'pad_token_id': None, 'bos_token_id': None, 'eos_token_id': None,
}  # fmt: skip
KINDS = ('full_attention', 'sliding_attention')
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
LLAMA3 |= {'original_max_position_embeddings': 16}
ROPES = ({'rope_type': 'default'}, {'rope_type': 'linear', 'factor': 4.0}, LLAMA3)
NUMBERS, THETA = st.sampled_from((0.5, 1.5, 2.0)), st.sampled_from((100.0, 1e4, 5e5))
TYPES = st.lists(st.sampled_from(KINDS), min_size=LAYERS, max_size=LAYERS)
WINDOW = st.sampled_from((5, 20, CONTEXT, 4096, None))
BIAS = {'attention_bias': st.booleans()}
GEMMA = {
  'sliding_window': st.sampled_from((5, 20)),
  'layer_types': TYPES,
  'query_pre_attn_scalar': st.integers(8, 30),
  'final_logit_softcapping': st.sampled_from((9.0, None)),
}
LATE = {'use_sliding_window': st.booleans(), 'sliding_window': WINDOW, 'max_window_layers': st.integers(0, 3)}
FACTORS = ('embedding_multiplier', 'residual_multiplier', 'attention_multiplier', 'logits_scaling')
# What a family has in config.json besides Llama's fields.
FIELDS = {
  'llama': BIAS,
  'mistral': {'sliding_window': WINDOW, 'layer_types': TYPES},
  'qwen2': LATE,
  'qwen3': LATE | BIAS,
  'smollm3': {
    'no_rope_layers': st.lists(st.integers(0, 1), min_size=LAYERS, max_size=LAYERS),
    'no_rope_layer_interval': st.integers(1, 3),
  },
  'phi3': {'sliding_window': WINDOW},
  'gemma2': GEMMA | BIAS | {'attn_logit_softcapping': st.sampled_from((4.0, None))},
  'gemma3_text': GEMMA | {'sliding_window_pattern': st.integers(1, 4), 'rope_local_base_freq': THETA},
  'olmo2': BIAS,
  'granite': BIAS | dict.fromkeys(FACTORS, NUMBERS),
}


@st.composite
def configs(draw):
  family = draw(st.sampled_from(sorted(FIELDS)))
  optional = {
    'num_key_value_heads': st.sampled_from((1, 2, 3, 6)),
    'tie_word_embeddings': st.booleans(),
    'rope_theta': THETA,
  }
  fields = draw(st.fixed_dictionaries({}, optional=optional | FIELDS[family]))
  if 'layer_types' in fields and fields.get('sliding_window', 0) is None:
    del fields['sliding_window']  # transformers' Ministral fails without one
  if family == 'mistral' or draw(st.booleans()):  # transformers' Ministral has no other size of heads
    fields['head_dim'] = draw(st.sampled_from((6, 8, 16)))
  rope = dict(draw(st.sampled_from(ROPES))) if family != 'phi3' else {'rope_type': 'default'}
  if draw(st.booleans()):
    rope['rope_theta'] = draw(THETA)
  if where := draw(st.sampled_from(('', 'rope_scaling', 'rope_parameters'))):
    fields[where] = rope
  return SHAPE | {'model_type': family} | fields


def windowed(fields):
  """Whether a layer of a Qwen has a window that matters, which is refused."""
  window = fields.get('sliding_window', 4096) or CONTEXT
  first = fields.get('max_window_layers', 28)
  return bool(fields.get('use_sliding_window')) and first < LAYERS and window < CONTEXT


MIXED = {'sliding_window': 5, 'head_dim': 8, 'layer_types': [*KINDS]}
THETAS = {'rope_theta': 100.0, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6}}


@settings(max_examples=settings.default.max_examples // 3)  # each is a new program
@given(configs())
@example(SHAPE | {'model_type': 'mistral'} | MIXED)
@example(SHAPE | {'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 5})
@example(SHAPE | {'model_type': 'llama'} | THETAS)
@example(SHAPE | {'model_type': 'gemma3_text', 'rope_parameters': {'rope_type': 'linear', 'factor': 4.0}})
def test_logits_are_those_of_transformers(fields):
  with tempfile.TemporaryDirectory() as place:
    directory = pathlib.Path(place)
    (directory / 'config.json').write_text(json.dumps(fields))
    config = transformers.AutoConfig.from_pretrained(directory)
    model = randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager'))
    tied = {'lm_head.weight'} if config.tie_word_embeddings else set()
    state = {name: x.contiguous() for name, x in model.state_dict().items() if name not in tied}
    save_file(state, directory / 'model.safetensors')
    if windowed(fields):
      refused(open_source, place)
      return
    source = open_source(place)
    tokens = random_tokens(source.config, rows=1, length=CONTEXT)
    ours = np.asarray(logits(source.config, source.load_params(), tokens))
  with torch.no_grad():
    theirs = model(torch.tensor(tokens)).logits.numpy()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3 * theirs.std())
