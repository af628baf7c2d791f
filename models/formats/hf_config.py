"""Reads and writes Hugging Face's `config.json`; errors name each unsupported field."""

import math
from typing import Any

from adapt_jax.models.config import MOST, LayerShape, Llama3Scaling, ModelConfig, RopeConfig
from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.families import FAMILIES

# model_type in config.json -> the family that computes the same function. `adapt_*` are our own
# exports: the stock architecture with per-layer widths or output biases.
_MODEL_TYPES = {
  name: family for family, traits in FAMILIES.items() for name in (family, f'adapt_{family}', *traits.aliases)
}

_SIZES = {  # names that differ in `MOST`
  'num_hidden_layers': 'num_layers',
  'num_attention_heads': 'num_heads',
  'num_key_value_heads': 'num_kv_heads',
  'intermediate_size': 'ffn',
}


def config_from_hf(raw: Any, where: str) -> ModelConfig:
  """The ModelConfig of a parsed `config.json`.

  Reads files of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). Pruned models
  have `per_layer_config`: {"5": {"num_key_value_heads": 2, "num_attention_heads": 6}}, and may have
  `output_bias`, or `sliced_from` if SliceGPT has sliced them. Error messages name `where`. Raises
  InputError for invalid values and for anything that this decoder would compute wrongly.
  """
  try:
    return _parse(raw)
  except InputError as error:
    raise InputError(f'{where}/config.json: {error}') from None
  except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
    reason = f'{type(error).__name__}: {first_line(error)}'
    raise InputError(f'{where}/config.json: has a value of the wrong type ({reason})') from None


def _parse(raw: Any) -> ModelConfig:
  if not isinstance(raw, dict):
    raise InputError(f'holds a {type(raw).__name__}, not an object')
  family = _supported_family(raw)
  traits = FAMILIES[family]
  raw = raw | {name: value for name, value in traits.defaults.items() if raw.get(name) is None}
  hidden, layers = _count(raw, 'hidden_size'), _layer_shapes(raw)
  return ModelConfig(
    family=family,
    vocab_size=_count(raw, 'vocab_size'),
    hidden_size=hidden,
    head_dim=_count(raw, 'head_dim', hidden // _count(raw, 'num_attention_heads')),
    layers=layers,
    rope=_rope(raw),
    rms_norm_eps=_number(raw, 'rms_norm_eps', 1e-6),
    tie_embeddings=bool(raw.get('share_embedding') or raw.get('tie_word_embeddings', False)),
    qkv_bias=traits.qkv_bias == 'always' or bool(raw.get('attention_bias')),
    output_bias=bool(raw.get('output_bias')),
    qk_norm=traits.qk_norm,
    max_position=_max_position(raw),
    sliced_from=_count(raw, 'sliced_from') if raw.get('sliced_from') else 0,
  )


def _value(fields: dict[str, Any], name: str, default: Any) -> Any:
  if name not in fields and default is None:
    raise InputError(f'no field {name!r}: is the file complete?')
  return default if fields.get(name) is None else fields[name]


def _count(fields: dict[str, Any], name: str, default: int | None = None) -> int:
  """A whole number from 1 to the largest of any model; `default` if the field is absent or null."""
  value = _value(fields, name, default)
  if type(value) is not int or value < 1:  # a bool is not accepted as a number
    raise InputError(f'{name} = {value!r} should be a whole number of at least 1')
  if value > (most := MOST.get(_SIZES.get(name, name), 2**31 - 1)):
    raise InputError(f'{name} = {_short(value)} should be at most {most:,}: download the file again')
  return value


def _short(value: int) -> str:
  return str(value) if value < 10**15 else f'a number of {value.bit_length()} bits'


def _number(fields: dict[str, Any], name: str, default: float | None = None) -> float:
  """A finite number above 0; `default` if the field is absent or null."""
  value = _value(fields, name, default)
  if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
    raise InputError(f'{name} = {value!r} should be a finite number above 0')
  return float(value)


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
  """An object; empty if the field is absent or null."""
  value = fields.get(name)
  if value is not None and not isinstance(value, dict):
    raise InputError(f'{name} = {value!r} should be an object')
  return value or {}


def _max_position(raw: dict[str, Any]) -> int:
  return _count({'max_position_embeddings': 2048} | raw, 'max_position_embeddings')


def _layer_shapes(raw: dict[str, Any]) -> tuple[LayerShape, ...]:
  heads, depth = _count(raw, 'num_attention_heads'), _count(raw, 'num_hidden_layers')
  widest = {
    'num_attention_heads': heads,
    'num_key_value_heads': _count(raw, 'num_key_value_heads', heads),
    'intermediate_size': _count(raw, 'intermediate_size'),
  }
  layers = [widest] * depth
  for key, fields in _object(raw, 'per_layer_config').items():
    # Late releases of transformers 5 pad the keys with zeros when they save: "05".
    if not key.isdecimal() or int(key) >= depth:
      raise InputError(f'per_layer_config has layer {key!r} of {depth}: export the model again')
    if not isinstance(fields, dict) or (unknown := sorted(fields.keys() - widest)):
      found = f'the field {unknown[0]!r}' if isinstance(fields, dict) else repr(fields)
      raise InputError(f'per_layer_config has {found} in layer {key}, which is not supported')
    layers[int(key)] = widest | {name: _count(fields, name) for name in fields}
  return tuple(
    LayerShape(w['num_attention_heads'], w['num_key_value_heads'], w['intermediate_size']) for w in layers
  )


def _supported_family(raw: dict[str, Any]) -> str:
  model_type = raw.get('model_type')
  family = _MODEL_TYPES.get(str(model_type))
  if family is None:
    asks = ' and needs its own code, which is never run' if 'auto_map' in raw else ''
    raise InputError(
      f'model_type {model_type!r} is not supported{asks}; supported: {", ".join(sorted(_MODEL_TYPES))}'
    )
  refused = {
    'hidden_act': raw.get('hidden_act', 'silu') not in ('silu', 'swish'),
    'attention_bias': bool(raw.get('attention_bias')) and FAMILIES[family].qkv_bias != 'optional',
    'mlp_bias': bool(raw.get('mlp_bias')),
    'quantization_config': bool(raw.get('quantization_config')),
    'num_experts': bool(raw.get('num_experts')),
    'num_local_experts': bool(raw.get('num_local_experts')),
    'layer_sharing': bool(raw.get('layer_sharing')),
    'partial_rotary_factor': raw.get('partial_rotary_factor', 1.0) != 1.0,
    'sliding_window': _sliding_window_in_use(raw, family),
  }
  for field, found in refused.items():
    if found:
      raise InputError(f'{field} = {raw.get(field)!r} is not supported; use a checkpoint without it')
  return family


def _sliding_window_in_use(raw: dict[str, Any], family: str) -> bool:
  kinds = raw.get('layer_types') or []
  if not isinstance(kinds, list):
    raise InputError(f'layer_types = {kinds!r} should be a list')
  if 'sliding_attention' in kinds:
    return True
  if FAMILIES[family].optional_window and not raw.get('use_sliding_window'):
    return False
  window = {'sliding_window': 4096} | raw  # transformers' default for all of them
  return window['sliding_window'] is not None and _count(window, 'sliding_window') < _max_position(raw)


def _rope(raw: dict[str, Any]) -> RopeConfig:
  # If both are present, transformers 5 uses the old one.
  parameters = _object(raw, 'rope_parameters') | _object(raw, 'rope_scaling')
  theta = _number(raw, 'rope_theta', _number(parameters, 'rope_theta', 10000.0))
  kind = parameters.get('rope_type', parameters.get('type', 'default'))
  if parameters.get('partial_rotary_factor', 1.0) != 1.0:
    raise InputError('partial_rotary_factor is not supported; use a checkpoint without it')
  if kind == 'default':
    return RopeConfig(theta)
  if kind != 'llama3':
    raise InputError(f'rope_type {kind!r} is not supported: only default and llama3 are')
  low, high = (_number(parameters, f'{end}_freq_factor') for end in ('low', 'high'))
  if low >= high:
    raise InputError(f'low_freq_factor = {low} should be below high_freq_factor = {high}')
  original = _count(parameters, 'original_max_position_embeddings')
  return RopeConfig(theta, Llama3Scaling(_number(parameters, 'factor'), low, high, original))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """`config.json` fields of the stock architecture with the widest layer's values.

  Both spellings of the rotary fields are written: transformers 4.57 and MLX-LM silently read a file
  with only `rope_parameters` as theta 10000. For a uniform config without output biases this
  is a complete stock config.json; `adapt_jax/export/hf.py` adds what other models need.
  """
  rope: dict[str, Any] = {'rope_type': 'default'}
  if s := config.rope.scaling:
    rope = {
      'rope_type': 'llama3',
      'factor': s.factor,
      'low_freq_factor': s.low_freq_factor,
      'high_freq_factor': s.high_freq_factor,
      'original_max_position_embeddings': s.original_max_position,
    }
  fields: dict[str, Any] = {
    'architectures': [f'{config.traits.stock}ForCausalLM'],
    'model_type': config.family,
    'vocab_size': config.vocab_size,
    'hidden_size': config.hidden_size,
    'intermediate_size': max(s.ffn for s in config.layers),
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': max(s.num_heads for s in config.layers),
    'num_key_value_heads': max(s.num_kv_heads for s in config.layers),
    'head_dim': config.head_dim,
    'hidden_act': 'silu',
    'max_position_embeddings': config.max_position,
    'rms_norm_eps': config.rms_norm_eps,
    'rope_theta': config.rope.theta,
    'rope_parameters': rope | {'rope_theta': config.rope.theta},
    'tie_word_embeddings': config.tie_embeddings,
  }
  if config.rope.scaling:  # a null here would only cause a deprecation warning
    fields['rope_scaling'] = rope
  if config.traits.qkv_bias == 'optional':
    fields['attention_bias'] = config.qkv_bias
  return fields | dict(config.traits.constants)
