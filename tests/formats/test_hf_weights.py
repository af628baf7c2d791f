"""Hugging Face checkpoints in and out: bits, spellings of config.json, and what is refused."""

import json
import math
import pathlib
import re
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_jax.models.config import LayerShape, LinearScaling, Llama3Scaling, RopeConfig, count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.families import FAMILIES
from adapt_jax.models.formats.hf_config import config_from_hf, config_to_hf
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.models.formats.safetensors import INDEX_NAME
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import UNIFORM, random_params, randomise, save_checkpoint, tiny_config


def files(directory):
  return sorted(p.name for p in directory.glob('*.safetensors'))


def tensors(directory):
  """Every tensor as (dtype, shape, bytes)."""
  merged = {}
  for name in files(directory):
    merged |= load_file(directory / name)
  return {k: (v.dtype.name, v.shape, v.tobytes()) for k, v in merged.items()}


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('sharded', [False, True])
def test_transformers_checkpoint_keeps_its_bits(family, dtype, sharded, tmp_path):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  raw = config_to_hf(tiny_config(family, UNIFORM))
  config = transformers.AutoConfig.for_model(**raw, pad_token_id=None)
  model = randomise(transformers.AutoModelForCausalLM.from_config(config)).to(getattr(torch, dtype))
  model.save_pretrained(tmp_path / 'in', max_shard_size=20_000 if sharded else '1GB')
  source = open_source(str(tmp_path / 'in'))
  assert source.dtype == dtype and source.config == tiny_config(family, UNIFORM)
  (tmp_path / 'out').mkdir()
  save_params(source.config, source.load_params(), tmp_path / 'out', shard_bytes=20_000 if sharded else 10**9)
  for directory in (tmp_path / 'in', tmp_path / 'out'):
    assert (directory / INDEX_NAME).exists() == sharded == (len(files(directory)) > 1)
  assert tensors(tmp_path / 'out') == tensors(tmp_path / 'in')
  (tmp_path / 'out/config.json').write_text((tmp_path / 'in/config.json').read_text())
  again = type(model).from_pretrained(tmp_path / 'out', dtype=model.dtype)
  for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
    assert torch.equal(ours, theirs), name


@pytest.mark.parametrize('family', [f for f, traits in FAMILIES.items() if traits.qkv_bias == 'optional'])
def test_a_stock_checkpoint_with_attention_bias_keeps_its_tensors(family, tmp_path):
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('torch')
  config = tiny_config(family, UNIFORM, qkv_bias=True)
  fields = config_to_hf(config)
  assert fields['attention_bias'] and config_from_hf(fields, 'here') == config
  fields |= {'pad_token_id': None}
  model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields))
  randomise(model).save_pretrained(tmp_path / 'in')
  source = open_source(str(tmp_path / 'in'))
  assert source.config == config
  (tmp_path / 'out').mkdir()
  save_params(source.config, source.load_params(), tmp_path / 'out')
  assert tensors(tmp_path / 'out') == tensors(tmp_path / 'in')
  assert count_params(config) == model.num_parameters()


@pytest.mark.parametrize('stored, wanted', [('float32', 'bfloat16'), ('bfloat16', 'float32')])
def test_dtype_is_cast_on_load_and_on_save(stored, wanted, tmp_path):
  config = tiny_config(layers=UNIFORM)
  params = random_params(config)
  save_checkpoint(tmp_path, config, params, dtype=stored)
  loaded = open_source(str(tmp_path)).load_params(wanted)
  expected = params['embed'].astype(stored).astype(wanted)
  assert loaded['embed'].dtype == wanted
  np.testing.assert_array_equal(np.asarray(loaded['embed']), expected)


def test_views_are_written_in_their_own_order(tmp_path):
  """safetensors writes the memory of an array such as w.T as it lies."""
  config = tiny_config('qwen2')
  params = random_params(config)
  save_checkpoint(tmp_path / 'a', config, params)
  for layer in params['layers']:
    for name, weight in layer['mlp'].items():
      layer['mlp'][name] = np.asfortranarray(weight)
  params['embed'] = np.asfortranarray(params['embed'])
  save_checkpoint(tmp_path / 'b', config, params)
  assert tensors(tmp_path / 'a') == tensors(tmp_path / 'b')


@pytest.mark.parametrize('family', FAMILIES)
def test_config_survives_the_round_trip(family):
  config = tiny_config(family, UNIFORM)
  assert config_from_hf(json.loads(json.dumps(config_to_hf(config))), 'here') == config


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
    ({'rope_theta': 5e5, 'rope_scaling': None}, RopeConfig(5e5)),
    ({'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'default'}}, RopeConfig(5e5)),
    ({'rope_theta': 5e5, 'rope_scaling': LLAMA3 | {'rope_type': 'llama3'}}, SCALED),
    ({'rope_theta': 5e5, 'rope_scaling': {'type': 'linear', 'factor': 1.0}}, RopeConfig(5e5)),
    (
      {'rope_theta': 5e5, 'rope_scaling': {'type': 'linear', 'factor': 4}},
      RopeConfig(5e5, LinearScaling(4.0)),
    ),
    ({'rope_theta': 5e5, 'rope_scaling': LLAMA3 | {'type': 'llama3'}}, SCALED),
    ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 5e5}}, RopeConfig(5e5)),
    ({'rope_parameters': {'rope_theta': 5e5}}, RopeConfig(5e5)),
    ({'rope_parameters': LLAMA3 | {'rope_type': 'llama3', 'rope_theta': 5e5}}, SCALED),
  ],
)
def test_both_spellings_of_rope_are_read(fields, expected):
  assert config_from_hf(base() | fields, 'here').rope == expected


def test_gemma2_names_its_activation_as_vllm_reads_it():
  found = config_to_hf(tiny_config('gemma2'))
  assert found['hidden_act'] == found['hidden_activation'] == 'gelu_pytorch_tanh'


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
  ('model_type', {'model_type': 'gpt2'}),
  ("'gemma3'", {'model_type': 'gemma3'}),
  ("'granitemoe'", {'model_type': 'granitemoe'}),
  ('use_bidirectional_attention', base('gemma3_text', use_bidirectional_attention=True)),
  ('layer_types', base('gemma2', layer_types=['chunked_attention'] * 2)),
  ('hidden_activation', base('gemma2', hidden_activation='relu')),
  ('no_rope_layers', base('smollm3', no_rope_layers=[1])),
  ('longrope', base('phi3', rope_scaling={'type': 'longrope'})),
  ('same heads', base('olmo2', per_layer_config={'0': {'num_attention_heads': 3, 'num_key_value_heads': 1}})),
  ('never run', {'model_type': 'mystery', 'auto_map': {'AutoModel': 'modeling_mystery.Model'}}),
  ('model_type', {'model_type': None}),
  ('yarn', {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}),
  ('dynamic', {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 1e4}}),
  (
    'yarn',
    {'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}},
  ),
  ('low_freq_factor', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}),
  (
    'rotary scaling of layers with sliding_attention',
    base(
      'gemma3_text',
      rope_local_base_freq=1e4,
      rope_parameters={'sliding_attention': {'rope_type': 'linear', 'factor': 2.0}},
    ),
  ),
  ('factor', {'rope_scaling': {'type': 'linear'}}),
  ('sliding_window', base('qwen2', use_sliding_window=True, sliding_window=64)),
  ('sliding_window', base('qwen3', layer_types=['full_attention', 'sliding_attention'])),
  ('num_local_experts', {'num_local_experts': 8}),
  ('num_experts', {'num_experts': 8}),
  ('attention_bias', base('mistral', attention_bias=True)),
  ('mlp_bias', {'mlp_bias': True}),
  ('hidden_act', {'hidden_act': 'gelu'}),
  ('layer_sharing', {'model_type': 'mobilellm', 'layer_sharing': True}),
  ('quantization_config', {'quantization_config': {'quant_method': 'gptq'}}),
  ('partial_rotary_factor', {'partial_rotary_factor': 0.5}),
  ("'skip'", {'per_layer_config': {'0': {'skip': ['mlp']}}}),
  ("layer '2' of 2", {'per_layer_config': {'2': {'intermediate_size': 8}}}),
  ("layer '-1' of 2", {'per_layer_config': {'-1': {'intermediate_size': 8}}}),
  ('num_kv_heads', {'num_key_value_heads': 4}),
  ('head_dim', {'head_dim': 7}),
]


@pytest.mark.parametrize('named, fields', REFUSED)
def test_what_would_be_computed_wrongly_is_refused_by_name(named, fields):
  with pytest.raises(InputError, match=re.escape(named)) as refusal:
    config_from_hf(base() | fields, 'here')
  assert '\n' not in str(refusal.value)


@pytest.mark.parametrize('field', ['hidden_size', 'intermediate_size', 'num_hidden_layers', 'vocab_size'])
def test_an_incomplete_config_is_refused_by_name(field):
  raw = {k: v for k, v in base().items() if k != field}
  with pytest.raises(InputError, match=field):
    config_from_hf(raw, 'here')


@pytest.mark.parametrize('raw', [[], None, base(hidden_size=None), base(vocab_size='many')])
def test_a_config_of_another_kind_is_refused(raw):
  with pytest.raises(InputError, match='config.json'):
    config_from_hf(raw, 'here')


ODD = [
  ("head_dim = 'abc'", {'head_dim': 'abc'}),
  ('head_dim = 0', {'num_attention_heads': 96, 'head_dim': None}),
  ("rope_theta = 'x'", {'rope_theta': 'x'}),
  ('rope_theta = nan', {'rope_theta': math.nan}),
  ('rope_theta = inf', {'rope_parameters': {'rope_theta': math.inf}}),
  ('rope_parameters = [1]', {'rope_parameters': [1]}),
  ("rope_scaling = 'llama3'", {'rope_scaling': 'llama3'}),
  ('factor', {'rope_scaling': LLAMA3 | {'rope_type': 'llama3', 'factor': None}}),
  ('low_freq_factor', {'rope_scaling': LLAMA3 | {'rope_type': 'llama3', 'low_freq_factor': 4.0}}),
  ('layer_types = 5', {'layer_types': 5}),
  ('embedding_multiplier = None', {'model_type': 'granite', 'embedding_multiplier': None}),
  ('logits_scaling = None', {'model_type': 'granite', 'logits_scaling': None}),
  ('query_pre_attn_scalar = None', {'model_type': 'gemma2', 'query_pre_attn_scalar': None}),
  ('hidden_size = 0', {'hidden_size': 0}),
  ('hidden_size = -48', {'hidden_size': -48}),
  ('hidden_size = 48.5', {'hidden_size': 48.5}),
  ('vocab_size = True', {'vocab_size': True}),
  ('num_attention_heads = 0', {'num_attention_heads': 0}),
  ('num_hidden_layers = 0', {'num_hidden_layers': 0}),
  ('num_key_value_heads = 0', {'num_key_value_heads': 0}),
  ('intermediate_size = 1000000000000', {'intermediate_size': 10**12}),
  ('max_position_embeddings = None', {'max_position_embeddings': None}),
  ("sliding_window = 'x'", base('mistral', sliding_window='x')),
  ('rms_norm_eps = nan', {'rms_norm_eps': math.nan}),
  ('OverflowError', {'rms_norm_eps': 10**400}),
  ('per_layer_config = [1]', {'per_layer_config': [1]}),
  ('per_layer_config has 5', {'per_layer_config': {'0': 5}}),
  ("intermediate_size = 'a'", {'per_layer_config': {'0': {'intermediate_size': 'a'}}}),
  ('intermediate_size = 1.5', {'per_layer_config': {'0': {'intermediate_size': 1.5}}}),
  ('intermediate_size = None', {'per_layer_config': {'0': {'intermediate_size': None}}}),
]


@pytest.mark.parametrize('named, fields', ODD)
def test_odd_values_are_refused_with_the_file(named, fields):
  with pytest.raises(InputError, match=re.escape(named)) as refusal:
    config_from_hf(base() | fields, 'here')
  assert str(refusal.value).startswith('here/config.json: ') and '\n' not in str(refusal.value)


def test_sliding_windows_out_of_use_are_accepted():
  assert config_from_hf(base('mistral', sliding_window=128), 'here').layers == UNIFORM
  config_from_hf(base('mistral', sliding_window=None, max_position_embeddings=32768), 'here')
  config_from_hf(base('qwen2', use_sliding_window=False, sliding_window=64), 'here')
  config_from_hf(base('qwen3', layer_types=['full_attention'] * 2), 'here')


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


def only_pickle(directory):
  (directory / 'model.safetensors').rename(directory / 'pytorch_model.bin')


def index(files_by_tensor):
  def damage(directory):
    (directory / INDEX_NAME).write_text(json.dumps({'weight_map': files_by_tensor}))

  return damage


def as_directory(name):
  def damage(directory):
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()

  return damage


def as_float8(directory):
  """Renames the dtype of one tensor in the header; numpy has no such type."""
  path = directory / 'model.safetensors'
  found = load_file(path)
  save_file(found | {UP: found[UP].astype(np.int8)}, path)
  content = path.read_bytes()
  (size,) = struct.unpack('<Q', content[:8])
  header = json.loads(content[8 : 8 + size])
  header[UP]['dtype'] = 'F8_E4M3'
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + content[8 + size :])


DAMAGES = {
  'missing': (damage_tensors(lambda t: t.pop(UP)), f'{UP} is missing'),
  'several-missing': (damage_tensors(lambda t: (t.pop(UP), t.pop(NORM))), 'is missing (and 1 more)'),
  'extra': (damage_tensors(lambda t: t.update({'q_scale': t[NORM].copy()})), 'q_scale is extra'),
  'shape': (damage_tensors(lambda t: t.update({UP: t[UP][1:].copy()})), f'{UP} has shape [39, 48]'),
  'integer': (damage_tensors(lambda t: t.update({UP: t[UP].astype(np.int8)})), f'{UP} has dtype I8'),
  'double': (damage_tensors(lambda t: t.update({UP: t[UP].astype(np.float64)})), f'{UP} has dtype F64'),
  'float8': (as_float8, f'{UP} has dtype F8_E4M3'),
  'truncated': (truncate, 'corrupt or truncated'),
  'empty': (lambda d: (d / 'model.safetensors').write_bytes(b''), 'corrupt or truncated'),
  'no-weights': (lambda d: (d / 'model.safetensors').unlink(), 'no model.safetensors'),
  'pickle': (only_pickle, 'convert the checkpoint to safetensors'),
  'shard-absent': (index({UP: 'model-00001-of-00002.safetensors'}), 'lists model-00001-of-00002.safetensors'),
  'not-in-shard': (index({'model.x.weight': 'model.safetensors'}), 'lists model.x.weight'),
  'shard-number': (index({UP: 5}), 'has no weight_map of tensors to files'),
  'shard-name-long': (index({UP: 'x' * 300}), 'cannot be read (File name too long)'),
  'weights-directory': (as_directory('model.safetensors'), 'is a directory, not a file'),
  'index-directory': (as_directory(INDEX_NAME), 'is a directory, not a file'),
  'config-directory': (as_directory('config.json'), 'is a directory, not a file'),
  'config-deep': (lambda d: (d / 'config.json').write_text('[' * 100_000), 'not valid JSON'),
  'generation-not-json': (lambda d: (d / 'generation_config.json').write_text('{'), 'not valid JSON'),
  'index-not-json': (lambda d: (d / INDEX_NAME).write_text('{"weight_map"'), 'not valid JSON'),
  'config-not-json': (lambda d: (d / 'config.json').write_text('{"model_type": "lla'), 'not valid JSON'),
  'config-not-text': (lambda d: (d / 'config.json').write_bytes(b'\xff\xfe\x00'), 'not valid JSON'),
  'config-absent': (lambda d: (d / 'config.json').unlink(), 'no config.json'),
}


@pytest.mark.parametrize('case', DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_line(case, tmp_path):
  config = tiny_config(layers=UNIFORM)
  save_checkpoint(tmp_path, config, random_params(config))
  damage, message = DAMAGES[case]
  damage(tmp_path)
  with pytest.raises(InputError, match=re.escape(message)) as refusal:
    open_source(str(tmp_path))  # nothing is loaded
  assert '\n' not in str(refusal.value) and str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize('stored', [False, True])
def test_output_biases_and_config_must_agree(stored, tmp_path):
  config = tiny_config('mistral', UNIFORM, output_bias=stored)
  raw = save_checkpoint(tmp_path, config, random_params(config))
  (tmp_path / 'config.json').write_text(json.dumps(raw | {'output_bias': not stored}))
  message = f'mlp.down_proj.bias is {"extra" if stored else "missing"} (and 3 more)'
  with pytest.raises(InputError, match=re.escape(message)):
    open_source(str(tmp_path))


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


def test_unreadable_directories_are_refused(tmp_path, monkeypatch):
  """A stand-in for permissions, which root does not feel."""
  plain = pathlib.Path.stat

  def stat(path, **options):
    if path.name == 'model.safetensors':
      raise PermissionError(13, 'Permission denied', str(path))
    return plain(path, **options)

  config = tiny_config(layers=UNIFORM)
  save_checkpoint(tmp_path, config, random_params(config))
  monkeypatch.setattr(pathlib.Path, 'stat', stat)
  with pytest.raises(InputError, match='cannot be read .Permission denied.') as refusal:
    open_source(str(tmp_path))
  assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
@pytest.mark.parametrize('family', ['llama', 'qwen2'])
def test_abstract_params_are_those_of_the_loaded(family, dtype, tmp_path):
  config = tiny_config(family, UNIFORM)
  save_checkpoint(tmp_path, config, random_params(config), dtype='float16')
  damage_tensors(lambda t: t.update({NORM: t[NORM].astype(np.float32)}))(tmp_path)
  source = open_source(str(tmp_path))
  loaded = source.load_params(dtype)
  expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
  assert source.abstract_params(dtype) == expected
  assert source.dtype == 'float16' and loaded['norm'].dtype == (dtype or 'float32')
