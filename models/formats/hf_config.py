"""Reads and writes Hugging Face's `config.json`; errors name each unsupported field."""

import dataclasses
import math
from typing import Any

from adapt_jax.models.config import LayerShape, LinearScaling, Llama3Scaling, ModelConfig, RopeConfig
from adapt_jax.models.errors import reading
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
_DEEPEST = 2_048  # layers; the shapes of a billion would fill the memory


def config_from_hf(raw: Any, where: str) -> ModelConfig:
  """The ModelConfig of a parsed `config.json`, read as transformers 5 does, in its spelling and that of 4.

  Pruned models have `per_layer_config`: {"5": {"num_key_value_heads": 2, "num_attention_heads": 6}}, and may
  have `output_bias`, or `sliced_from` if SliceGPT has sliced them. Error messages name `where`. Raises
  InputError for invalid values and for anything that this decoder would compute wrongly.
  """
  with reading('', f'{where}/config.json', 'use a model of the families in docs/families.md'):
    return _parse(raw)


def _parse(raw: dict[str, Any]) -> ModelConfig:
  family = _family(raw)
  traits = FAMILIES[family]
  raw = {**traits.defaults, **raw}
  layers = _layers(raw, traits)
  _refuse_unsupported(raw, traits, layers)
  if family == 'ministral' and len({shape.window for shape in layers}) == 1:
    family = 'mistral'
  hidden = _count(raw, 'hidden_size')
  config = ModelConfig(
    family=family,
    vocab_size=_count(raw, 'vocab_size'),
    hidden_size=hidden,
    head_dim=_count(raw, 'head_dim', hidden // _count(raw, 'num_attention_heads')),
    layers=layers,
    rope=_rope(raw, traits),
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


def _number(fields: dict[str, Any], name: str, default: float | None = None, kind: type = float) -> float:
  """A finite number above 0; `default` if the field is absent or null."""
  value: Any = default if fields.get(name) is None else fields[name]
  most = 2**31 if kind is int else math.inf
  if type(value) not in (int, kind) or not 0 < value < most:  # a bool is no number
    raise ValueError(f'{name} = {value!r} should be a positive {kind.__name__}')
  return kind(value)


def _count(fields: dict[str, Any], name: str, default: int | None = None) -> int:
  """A whole number from 1 to 2^31 - 1; `default` if the field is absent or null."""
  return int(_number(fields, name, default, int))


def _numbers(raw: dict[str, Any], traits: Family) -> dict[str, Any]:
  """The fields of `ModelConfig` that the family has as numbers in config.json."""
  numbers = {}
  for field, number in traits.numbers.items():
    if number.is_cap and raw.get(number.name) is None:
      numbers[field] = 0.0
      continue
    value = _number(raw, number.name)
    numbers[field] = value**-0.5 if number.inverse_root else value
  return numbers


def _max_position(raw: dict[str, Any]) -> int:
  return _count(raw, 'max_position_embeddings', 2048)


def _layers(raw: dict[str, Any], traits: Family) -> tuple[LayerShape, ...]:
  """The widths of all layers, and the kind of their attention."""
  heads, depth = _count(raw, 'num_attention_heads'), min(_count(raw, 'num_hidden_layers'), _DEEPEST)
  widest = {
    'num_attention_heads': heads,
    'num_key_value_heads': _count(raw, 'num_key_value_heads', heads),
    'intermediate_size': _count(raw, 'intermediate_size'),
  }
  widths = [widest] * depth
  for key, fields in (raw.get('per_layer_config') or {}).items():
    # Late releases of transformers 5 pad the keys with zeros when they save: "05".
    if int(key) not in range(depth) or fields.keys() - widest.keys():
      raise ValueError(f'per_layer_config has {fields} in layer {key} of {depth}, which is not supported')
    widths[int(key)] = widest | {name: _count(fields, name) for name in fields}
  kinds = zip(widths, _windows(raw, traits, depth), _rotary(raw, traits, depth), strict=True)
  return tuple(
    LayerShape(w['num_attention_heads'], w['num_key_value_heads'], w['intermediate_size'], window, rotary)
    for w, window, rotary in kinds
  )


def _windows(raw: dict[str, Any], traits: Family, depth: int) -> list[int]:
  """The window of each layer's attention; 0 for none, or if no row is longer."""
  window = _count(raw, 'sliding_window') if raw.get('sliding_window') is not None else 0
  if not traits.local_rope and window >= _max_position(raw):
    window = 0
  if traits.windows == 'all':
    kinds = [_TYPES[1]] * depth
  elif traits.windows == 'some':
    every = _count(raw, 'sliding_window_pattern', depth + 1)
    kinds = [_TYPES[i % every > 0] for i in range(1, depth + 1)]
  else:
    first = 0 if traits.unrotated else raw.get('max_window_layers', 28)
    kinds = [_TYPES[bool(raw.get('use_sliding_window')) and i >= first] for i in range(depth)]
  if traits.windows != 'all':
    kinds = raw.get('layer_types') or kinds
  of_kind = dict(zip(_TYPES, (0, window), strict=True))
  return [of_kind[kind] for kind in kinds]


def _rotary(raw: dict[str, Any], traits: Family, depth: int) -> list[bool]:
  """Whether each layer has rotary embeddings."""
  if not traits.unrotated:
    return [True] * depth
  every = _count(raw, 'no_rope_layer_interval', 4)
  flags = raw.get('no_rope_layers') or [i % every != 0 for i in range(1, depth + 1)]
  return [{0: False, 1: True}[flag] for flag in flags]


def _family(raw: dict[str, Any]) -> str:
  family = _MODEL_TYPES.get(raw['model_type'])
  if family is None:
    asks = ' and needs its own code, which is never run' if 'auto_map' in raw else ''
    raise ValueError(f'model_type {raw["model_type"]!r} is not supported{asks}')
  # As transformers: a Mistral with a list of layer types is a Ministral.
  return 'ministral' if family == 'mistral' and 'layer_types' in raw else family


def _refuse_unsupported(raw: dict[str, Any], traits: Family, layers: tuple[LayerShape, ...]) -> None:
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
    'sliding_window': traits.windows == 'unsupported' and any(shape.window for shape in layers),
    'num_hidden_layers': len(layers) == _DEEPEST,
  }
  if unsupported := [field for field, present in refused.items() if present]:
    raise ValueError(f'{unsupported[0]} = {raw.get(unsupported[0])!r} is not supported')


def _local_rope(raw: dict[str, Any]) -> RopeConfig:
  """The rotary embedding of layers with a window; the old field has only its base frequency."""
  parameters = (raw.get('rope_parameters') or {}).get(_TYPES[1]) or {}
  return _rope_of(parameters, _number(raw, 'rope_local_base_freq'), kinds=('default',))


def _rope(raw: dict[str, Any], traits: Family) -> RopeConfig:
  """The rotary embedding; of layers without a window if those with one have another."""
  old, parameters = raw.get('rope_scaling') or {}, raw.get('rope_parameters') or {}
  if traits.local_rope:
    parameters, old = (parameters.get(_TYPES[0]) or {}) | old, {}
  return _rope_of(old or parameters, _number(raw, 'rope_theta', traits.usual_theta))


def _rope_of(
  parameters: dict[str, Any], theta: float, kinds: tuple[str, ...] = ('default', 'linear', 'llama3')
) -> RopeConfig:
  theta = _number(parameters, 'rope_theta', theta)
  kind = parameters.get('rope_type', parameters.get('type', 'default'))
  if kind not in kinds or parameters.get('partial_rotary_factor', 1.0) != 1.0:
    raise ValueError(f'the rotary embedding {parameters} is not supported, only {", ".join(kinds)}')
  if kind == 'default':
    return RopeConfig(theta)
  factor = _number(parameters, 'factor')
  if kind == 'linear':
    return RopeConfig(theta, LinearScaling(factor) if factor != 1 else None)
  low, high = (_number(parameters, f'{end}_freq_factor') for end in ('low', 'high'))
  if low >= high:
    raise ValueError(f'low_freq_factor = {low} should be below high_freq_factor = {high}')
  original = _count(parameters, 'original_max_position_embeddings')
  return RopeConfig(theta, Llama3Scaling(factor, low, high, original))


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
