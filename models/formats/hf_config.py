"""Reads and writes Hugging Face's `config.json`; errors name each unsupported field."""

import dataclasses
import math
from typing import Any

from adapt_jax.models.config import MOST, LayerShape, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from adapt_jax.models.errors import InputError, first_line
from adapt_jax.models.families import FAMILIES, Family

# model_type in config.json -> the family that computes the same function. `adapt_*` are our own
# exports: the stock architecture with per-layer widths or output biases.
_MODEL_TYPES = {
  name: family for family, traits in FAMILIES.items() for name in (family, f'adapt_{family}', *traits.aliases)
}
# Activation -> its field in config.json, and its names there; the first one is written.
_ACTIVATIONS = {
  'silu': ('hidden_act', ('silu', 'swish')),
  'gelu_tanh': ('hidden_activation', ('gelu_pytorch_tanh',)),
}
_TYPES = ('full_attention', 'sliding_attention')
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
  family = _family(raw)
  traits = FAMILIES[family]
  raw = {**traits.defaults, **raw}
  _refuse_unsupported(raw, traits)
  hidden = _count(raw, 'hidden_size')
  config = ModelConfig(
    family=family,
    vocab_size=_count(raw, 'vocab_size'),
    hidden_size=hidden,
    head_dim=_count(raw, 'head_dim', hidden // _count(raw, 'num_attention_heads')),
    layers=_layers(raw, traits),
    rope=_rope(raw, traits.usual_theta, _TYPES[0] if traits.local_rope else ''),
    local_rope=_local_rope(raw) if traits.local_rope else None,
    embedding_scale=hidden**0.5 if traits.root_embedding else 1.0,
    rms_norm_eps=_number(raw, 'rms_norm_eps', 1e-6),
    tie_embeddings=bool(raw.get('share_embedding') or raw.get('tie_word_embeddings', False)),
    qkv_bias=traits.qkv_bias == 'always' or bool(raw.get('attention_bias')),
    output_bias=bool(raw.get('output_bias')),
    qk_norm=traits.qk_norm,
    max_position=_max_position(raw),
    sliced_from=_count(raw, 'sliced_from') if raw.get('sliced_from') else 0,
  )
  return dataclasses.replace(config, **_numbers(raw, traits))


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


def _numbers(raw: dict[str, Any], traits: Family) -> dict[str, Any]:
  """The fields of `ModelConfig` that the family has as numbers in config.json."""
  found = {}
  for field, number in traits.numbers.items():
    if number.is_cap and raw.get(number.name) is None:
      found[field] = 0.0
      continue
    value = _number(raw, number.name)
    found[field] = value**-0.5 if number.inverse_root else value
  return found


def _object(fields: dict[str, Any], name: str) -> dict[str, Any]:
  """An object; empty if the field is absent or null."""
  value = fields.get(name)
  if value is not None and not isinstance(value, dict):
    raise InputError(f'{name} = {value!r} should be an object')
  return value or {}


def _max_position(raw: dict[str, Any]) -> int:
  return _count({'max_position_embeddings': 2048} | raw, 'max_position_embeddings')


def _layers(raw: dict[str, Any], traits: Family) -> tuple[LayerShape, ...]:
  """The widths of all layers, and the kind of their attention."""
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
    LayerShape(w['num_attention_heads'], w['num_key_value_heads'], w['intermediate_size'], window, rotary)
    for w, window, rotary in zip(
      layers, _windows(raw, traits, depth), _rotary(raw, traits, depth), strict=True
    )
  )


def _windows(raw: dict[str, Any], traits: Family, depth: int) -> list[int]:
  """The window of each layer's attention; 0 for none."""
  if traits.windows == 'unsupported':
    return [0] * depth
  if traits.windows == 'all':
    return [_window(raw)] * depth
  window, every = _count(raw, 'sliding_window'), _count(raw, 'sliding_window_pattern')
  usual = [_TYPES[i % every > 0] for i in range(1, depth + 1)]
  types = _layer_types(raw) or usual
  if len(types) != depth or set(types) - set(_TYPES):
    raise InputError(f'layer_types = {types!r} should have {" or ".join(_TYPES)} for each of {depth} layers')
  return [window if kind == _TYPES[1] else 0 for kind in types]


def _rotary(raw: dict[str, Any], traits: Family, depth: int) -> list[bool]:
  """Whether each layer has rotary embeddings."""
  if not traits.unrotated:
    return [True] * depth
  every = _count(raw, 'no_rope_layer_interval', 4)
  found = raw.get('no_rope_layers') or [int(i % every != 0) for i in range(1, depth + 1)]
  if not isinstance(found, list) or len(found) != depth or not all(flag in (0, 1) for flag in found):
    raise InputError(f'no_rope_layers = {found!r} should have 1 (rotary) or 0 for each of {depth} layers')
  return [bool(flag) for flag in found]


def _family(raw: dict[str, Any]) -> str:
  model_type = raw.get('model_type')
  family = _MODEL_TYPES.get(str(model_type))
  if family is None:
    asks = ' and needs its own code, which is never run' if 'auto_map' in raw else ''
    raise InputError(
      f'model_type {model_type!r} is not supported{asks}; supported: {", ".join(sorted(_MODEL_TYPES))}'
    )
  return family


def _refuse_unsupported(raw: dict[str, Any], traits: Family) -> None:
  activation, names = _ACTIVATIONS[traits.activation]
  refused = {
    activation: raw.get(activation, names[0]) not in names,
    'use_bidirectional_attention': bool(raw.get('use_bidirectional_attention')),
    'attention_bias': bool(raw.get('attention_bias')) and traits.qkv_bias != 'optional',
    'mlp_bias': bool(raw.get('mlp_bias')),
    'quantization_config': bool(raw.get('quantization_config')),
    'num_experts': bool(raw.get('num_experts')),
    'num_local_experts': bool(raw.get('num_local_experts')),
    'layer_sharing': bool(raw.get('layer_sharing')),
    'partial_rotary_factor': raw.get('partial_rotary_factor', 1.0) != 1.0,
    'sliding_window': traits.windows == 'unsupported' and _sliding_window_in_use(raw),
  }
  for field, found in refused.items():
    if found:
      raise InputError(f'{field} = {raw.get(field)!r} is not supported; use a checkpoint without it')


def _sliding_window_in_use(raw: dict[str, Any]) -> bool:
  window = {'sliding_window': 4096} | raw  # transformers' default
  return 'sliding_attention' in _layer_types(raw) or (
    bool(raw.get('use_sliding_window')) and _window(window) > 0
  )


def _layer_types(raw: dict[str, Any]) -> list[Any]:
  kinds = raw.get('layer_types') or []
  if not isinstance(kinds, list):
    raise InputError(f'layer_types = {kinds!r} should be a list')
  return kinds


def _window(raw: dict[str, Any]) -> int:
  """`sliding_window`; 0 if it is null, or if no row is longer."""
  if raw.get('sliding_window') is None:
    return 0
  window = _count(raw, 'sliding_window')
  return window if window < _max_position(raw) else 0


def _local_rope(raw: dict[str, Any]) -> RopeConfig:
  """The rotary embedding of layers with a window; the old field has only its base frequency."""
  parameters = _object(_object(raw, 'rope_parameters'), _TYPES[1])
  rope = _rope({'rope_parameters': parameters}, _number(raw, 'rope_local_base_freq'))
  if rope.scaling:
    raise InputError(
      f'rotary scaling of layers with {_TYPES[1]} is not supported; use a checkpoint without it'
    )
  return rope


def _rope(raw: dict[str, Any], usual_theta: float, layer_type: str = '') -> RopeConfig:
  """The rotary embedding, of layers of one type if transformers 5 has stored it for each."""
  if layer_type in (by_type := _object(raw, 'rope_parameters')):
    parameters = _object(by_type, layer_type)
    raw = raw | {
      'rope_parameters': parameters,
      'rope_theta': parameters.get('rope_theta', raw.get('rope_theta')),
    }
  # If both are present, transformers 5 uses the old one.
  parameters = _object(raw, 'rope_parameters') | _object(raw, 'rope_scaling')
  theta = _number(raw, 'rope_theta', _number(parameters, 'rope_theta', usual_theta))
  kind = parameters.get('rope_type', parameters.get('type', 'default'))
  if parameters.get('partial_rotary_factor', 1.0) != 1.0:
    raise InputError('partial_rotary_factor is not supported; use a checkpoint without it')
  if kind == 'default':
    return RopeConfig(theta)
  if kind == 'linear':
    factor = _number(parameters, 'factor')
    return RopeConfig(theta, LinearScaling(factor) if factor != 1 else None)
  if kind != 'llama3':
    raise InputError(f'rope_type {kind!r} is not supported: only default, linear and llama3 are')
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
  s = config.rope.scaling
  if isinstance(s, LinearScaling):
    rope = {'rope_type': 'linear', 'factor': s.factor}
  elif s:
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
    'max_position_embeddings': config.max_position,
    'rms_norm_eps': config.rms_norm_eps,
    'rope_theta': config.rope.theta,
    'rope_parameters': rope | {'rope_theta': config.rope.theta},
    'tie_word_embeddings': config.tie_embeddings,
  }
  if config.rope.scaling:  # a null here would only cause a deprecation warning
    fields['rope_scaling'] = rope
  return fields | _family_fields(config, fields['rope_parameters'])


def _family_fields(config: ModelConfig, rope: dict[str, Any]) -> dict[str, Any]:
  """What the family has in config.json besides Llama's fields. `rope` is that of layers without a window."""
  fields: dict[str, Any] = {}
  traits = config.traits
  activation, names = _ACTIVATIONS[traits.activation]
  fields[activation] = fields['hidden_act'] = names[0]  # vLLM reads the latter of Gemma 2
  if traits.qkv_bias == 'optional':
    fields['attention_bias'] = config.qkv_bias
  if traits.windows == 'all':
    fields['sliding_window'] = config.layers[0].window or None
  if traits.windows == 'some':
    fields['sliding_window'] = max(s.window for s in config.layers) or traits.defaults['sliding_window']
    fields['layer_types'] = [_TYPES[s.window > 0] for s in config.layers]
  if traits.unrotated:
    fields['no_rope_layers'] = [int(s.rotary) for s in config.layers]
  if local := config.local_rope:
    fields['rope_local_base_freq'] = local.theta
    by_type = (rope, {'rope_type': 'default', 'rope_theta': local.theta})
    fields['rope_parameters'] = dict(zip(_TYPES, by_type, strict=True))
  for field, number in traits.numbers.items():
    value = getattr(config, field)
    fields[number.name] = round(value**-2) if number.inverse_root else value or None
  return fields | dict(traits.constants)
