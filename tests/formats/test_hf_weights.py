"""Hugging Face checkpoints in and out: bits, spellings of config.json, and what is refused."""

import math

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_jax.models.config import LayerShape, LinearScaling, Llama3Scaling, RopeConfig, count_params
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.formats.hf_config import config_from_hf, config_to_hf
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.models.formats.safetensors import INDEX_NAME
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import UNIFORM, random_params, randomise, refused, save_checkpoint, tiny_config


def files(directory):
  return sorted(p.name for p in directory.glob('*.safetensors'))


def tensors(directory):
  """Every tensor as (dtype, shape, bytes)."""
  merged = {}
  for name in files(directory):
    merged |= load_file(directory / name)
  return {k: (v.dtype.name, v.shape, v.tobytes()) for k, v in merged.items()}


DTYPES = ('float32', 'bfloat16', 'float16')
STOCK = [(family, DTYPES[i % 3], i % 2 == 0, {}) for i, family in enumerate(FAMILIES)]
STOCK += [('llama', 'bfloat16', False, {'qkv_bias': True}), ('olmo2', 'float16', True, {'qkv_bias': True})]


@pytest.mark.parametrize('family, dtype, sharded, fields', STOCK)
def test_transformers_checkpoint_keeps_its_bits(family, dtype, sharded, fields, tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  config = tiny_config(family, UNIFORM, **fields)
  stock = transformers.AutoConfig.for_model(**config_to_hf(config), pad_token_id=None)
  model = randomise(transformers.AutoModelForCausalLM.from_config(stock)).to(getattr(torch, dtype))
  model.save_pretrained(tmp_path / 'in', max_shard_size=20_000 if sharded else '1GB')
  source = open_source(str(tmp_path / 'in'))
  assert source.dtype == dtype and source.config == config
  assert count_params(config) == model.num_parameters()
  (tmp_path / 'out').mkdir()
  save_params(source.config, source.load_params(), tmp_path / 'out', shard_bytes=20_000 if sharded else 10**9)
  for directory in (tmp_path / 'in', tmp_path / 'out'):
    assert (directory / INDEX_NAME).exists() == sharded == (len(files(directory)) > 1)
  assert tensors(tmp_path / 'out') == tensors(tmp_path / 'in')


@pytest.mark.parametrize('stored, wanted', [('float32', 'bfloat16'), ('bfloat16', 'float32')])
def test_dtype_is_cast_on_load_and_on_save(stored, wanted, tmp_path):
  config = tiny_config(layers=UNIFORM)
  params = random_params(config)
  save_checkpoint(tmp_path, config, params, dtype=stored)
  loaded = open_source(str(tmp_path)).load_params(wanted)
  expected = params['embed'].astype(stored).astype(wanted)
  assert loaded['embed'].dtype == wanted
  np.testing.assert_array_equal(np.asarray(loaded['embed']), expected)


LLAMA3 = {
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
SCALED = RopeConfig(5e5, Llama3Scaling(8.0, 1.0, 4.0, 32))


@pytest.mark.parametrize(
  'fields, expected',
  [
    ({}, RopeConfig(1e4)),
    ({'rope_theta': 5e5}, RopeConfig(5e5)),
    ({'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'default'}}, RopeConfig(5e5)),
    (
      {'rope_theta': 5e5, 'rope_scaling': {'type': 'linear', 'factor': 4}},
      RopeConfig(5e5, LinearScaling(4.0)),
    ),
    ({'rope_theta': 5e5, 'rope_scaling': LLAMA3 | {'type': 'llama3'}}, SCALED),
    ({'rope_parameters': {'rope_theta': 5e5}}, RopeConfig(5e5)),
    ({'rope_parameters': LLAMA3 | {'rope_type': 'llama3', 'rope_theta': 5e5}}, SCALED),
    # As in transformers 5: what is said of the embedding itself wins.
    ({'rope_theta': 1e4, 'rope_parameters': {'rope_theta': 5e5}}, RopeConfig(5e5)),
    (
      {'rope_scaling': {'rope_type': 'default', 'rope_theta': 5e5}, 'rope_parameters': LLAMA3},
      RopeConfig(5e5),
    ),
  ],
)
def test_both_spellings_of_rope_are_read(fields, expected):
  assert config_from_hf(base() | fields, 'here').rope == expected


def test_both_spellings_of_gemma3_are_read():
  config = tiny_config('gemma3_text', UNIFORM)
  raw = config_to_hf(config)
  old = {k: v for k, v in raw.items() if k not in ('rope_parameters', 'layer_types')}
  assert config_from_hf(old | {'sliding_window_pattern': 2}, 'here') == config
  new = {k: v for k, v in raw.items() if k not in ('rope_theta', 'rope_local_base_freq')}
  assert config_from_hf(new, 'here') == config


def test_per_layer_widths_are_read_with_padded_keys():
  """transformers 5 saves "05" for layer 5 of a model of more than ten."""
  widths = {'05': {'num_attention_heads': 3, 'num_key_value_heads': 1}, '11': {'intermediate_size': 7}}
  raw = base() | {'model_type': 'adapt_llama', 'num_hidden_layers': 12, 'per_layer_config': widths}
  layers = config_from_hf(raw, 'here').layers
  assert layers[5] == LayerShape(3, 1, 40) and layers[11] == LayerShape(6, 2, 7)
  assert set(layers[:5] + layers[6:11]) == {LayerShape(6, 2, 40)}


def base(family='llama', **fields):
  """A config.json without rotary fields."""
  raw = config_to_hf(tiny_config(family, UNIFORM))
  return {k: v for k, v in raw.items() if not k.startswith('rope_')} | fields


REFUSED = [
  {'model_type': None},
  {'model_type': 'mystery', 'auto_map': {'AutoModel': 'modeling_mystery.Model'}},
  base('gemma3_text', use_bidirectional_attention=True),
  base('gemma2', layer_types=['chunked_attention'] * 2),
  base('smollm3', no_rope_layers=[1]),
  base('olmo2', per_layer_config={'0': {'num_attention_heads': 3, 'num_key_value_heads': 1}}),
  {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}},
  {'rope_scaling': LLAMA3 | {'rope_type': 'llama3', 'low_freq_factor': 4.0}},
  base('gemma3_text', rope_parameters={'sliding_attention': {'rope_type': 'linear', 'factor': 2.0}}),
  base('qwen2', use_sliding_window=True, sliding_window=64, max_window_layers=1),
  base('qwen3', layer_types=['full_attention', 'sliding_attention'], sliding_window=64),
  {'num_experts': 8},
  base('mistral', attention_bias=True),
  {'mlp_bias': True},
  {'hidden_act': 'gelu'},
  {'model_type': 'mobilellm', 'layer_sharing': True},
  {'quantization_config': {'quant_method': 'gptq'}},
  {'partial_rotary_factor': 0.5},
  {'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}},
  {'per_layer_config': {'0': {'skip': ['mlp']}}},
  {'per_layer_config': {'2': {'intermediate_size': 8}}},
  {'num_key_value_heads': 4},
  {'head_dim': 7},
  {'rope_theta': math.nan},
  {'hidden_size': 48.5},
  {'vocab_size': None},
]


@pytest.mark.parametrize('fields', REFUSED, ids=str)
def test_what_would_be_computed_wrongly_is_refused_with_the_file(fields):
  message = refused(config_from_hf, base() | fields, 'here')
  assert message.startswith('here/config.json: ') and ('mystery' not in str(fields) or 'never run' in message)


def test_sliding_windows_out_of_use_are_accepted():
  assert config_from_hf(base('mistral', sliding_window=128), 'here').layers == UNIFORM
  config_from_hf(base('mistral', sliding_window=None, max_position_embeddings=32768), 'here')
  config_from_hf(base('qwen2', use_sliding_window=False, sliding_window=64), 'here')
  for layers in (2, 28):
    used = {'use_sliding_window': True, 'sliding_window': 64, 'max_window_layers': layers}
    assert config_from_hf(base('qwen3', **used), 'here').layers == UNIFORM
  config_from_hf(base('qwen3', layer_types=['full_attention'] * 2), 'here')
  absent = base('phi3', max_position_embeddings=2**17)
  absent.pop('sliding_window')
  assert not any(shape.window for shape in config_from_hf(absent, 'here').layers)


def test_a_mistral_with_layer_types_has_windows_in_those_layers_only():
  types = ['sliding_attention', 'full_attention']
  config = config_from_hf(base('mistral', sliding_window=5, layer_types=types), 'here')
  assert [shape.window for shape in config.layers] == [5, 0] and config.family == 'ministral'
  alike = config_from_hf(base('mistral', sliding_window=5, layer_types=types[:1] * 2), 'here')
  assert [shape.window for shape in alike.layers] == [5, 5] and alike.family == 'mistral'


UP = 'model.layers.1.mlp.up_proj.weight'
NORM = 'model.norm.weight'


def damage_tensors(change):
  def damage(directory):
    path = directory / 'model.safetensors'
    found = load_file(path)
    change(found)
    save_file(found, path)

  return damage


def truncate(directory):
  path = directory / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
  'missing': (damage_tensors(lambda t: (t.pop(UP), t.pop(NORM))), f'{UP} is missing (and 1 more)'),
  'extra': (damage_tensors(lambda t: t.update({'q_scale': t[NORM].copy()})), 'q_scale is extra'),
  'shape': (damage_tensors(lambda t: t.update({UP: t[UP][1:].copy()})), f'{UP} has shape [39, 48]'),
  'double': (damage_tensors(lambda t: t.update({UP: t[UP].astype(np.float64)})), f'{UP} has dtype F64'),
  'truncated': (truncate, 'model.safetensors'),
  'pickle': (
    lambda d: (d / 'model.safetensors').rename(d / 'pytorch_model.bin'),
    'convert the checkpoint to safetensors',
  ),
  'shard-absent': (
    lambda d: (d / INDEX_NAME).write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}'),
    'model-1.safetensors',
  ),
  'config-absent': (lambda d: (d / 'config.json').unlink(), 'config.json'),
}


@pytest.mark.parametrize('case', DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_line(case, tmp_path):
  config = tiny_config(layers=UNIFORM)
  save_checkpoint(tmp_path, config, random_params(config))
  damage, named = DAMAGES[case]
  damage(tmp_path)
  message = refused(open_source, str(tmp_path))  # nothing is loaded
  assert named in message and str(tmp_path) in message


def test_old_rotary_buffers_and_tied_heads_are_left_out(tmp_path):
  config = tiny_config(layers=UNIFORM, tie_embeddings=True)
  params = random_params(config)
  save_checkpoint(tmp_path, config, params)
  extra = {
    'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(6, np.float32),
    'lm_head.weight': params['embed'].astype(ml_dtypes.bfloat16),
  }
  damage_tensors(lambda found: found.update(extra))(tmp_path)
  assert 'lm_head' not in open_source(str(tmp_path)).load_params()


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_abstract_params_are_those_of_the_loaded(dtype, tmp_path):
  config = tiny_config('qwen2', UNIFORM)
  save_checkpoint(tmp_path, config, random_params(config), dtype='float16')
  damage_tensors(lambda t: t.update({NORM: t[NORM].astype(np.float32)}))(tmp_path)
  source = open_source(str(tmp_path))
  loaded = source.load_params(dtype)
  expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
  assert source.abstract_params(dtype) == expected
  assert source.dtype == 'float16' and loaded['norm'].dtype == (dtype or 'float32')
