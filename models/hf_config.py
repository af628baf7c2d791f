"""Hugging Face `config.json` in and out, and by name what is refused."""

from typing import Any

from models.config import FAMILIES, LayerShape, Llama3Scaling, ModelConfig, RopeConfig
from models.errors import InputError

# model_type in config.json -> the family that computes the same function. `adapt_*` are our own
# exports: the stock architecture with per-layer widths.
_MODEL_TYPES = {
  **{f: f for f in FAMILIES},
  **{f'adapt_{f}': f for f in FAMILIES},
  'mobilellm': 'llama',
}
_ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'mistral': 'MistralForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
}


def config_from_hf(raw: dict[str, Any], where: str) -> ModelConfig:
  """The ModelConfig of a parsed `config.json`.

  Reads files of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`), and the
  `per_layer_config` of pruned models: {"5": {"num_key_value_heads": 2, "num_attention_heads": 6}}.
  `where` is named in errors. Raises InputError for anything this decoder would compute wrongly.
  """
  if not isinstance(raw, dict):
    raise InputError(f'{where}: config.json holds a {type(raw).__name__}, not an object')
  family = _supported_family(raw, where)
  try:
    hidden, heads, depth = (int(raw[k]) for k in ('hidden_size', 'num_attention_heads', 'num_hidden_layers'))
    widest = {
      'num_attention_heads': heads,
      'num_key_value_heads': int(raw.get('num_key_value_heads') or heads),
      'intermediate_size': int(raw['intermediate_size']),
    }
    vocab, eps = int(raw['vocab_size']), float(raw.get('rms_norm_eps', 1e-6))
  except KeyError as error:
    raise InputError(f'{where}: config.json has no field {error}: is the file complete?') from None
  except (TypeError, ValueError) as error:
    raise InputError(f'{where}: a width in config.json is not a number ({error})') from None
  layers = _layer_shapes(raw, widest, depth, where)
  return ModelConfig(
    family=family,
    vocab_size=vocab,
    hidden_size=hidden,
    head_dim=int(raw.get('head_dim') or (128 if family == 'qwen3' else hidden // heads)),
    layers=layers,
    rope=_rope(raw, where),
    rms_norm_eps=eps,
    tie_embeddings=bool(raw.get('share_embedding') or raw.get('tie_word_embeddings', False)),
    qkv_bias=family == 'qwen2',
    qk_norm=family == 'qwen3',
    max_position=int(raw.get('max_position_embeddings', 2048)),
  )


def _layer_shapes(
  raw: dict[str, Any], widest: dict[str, int], depth: int, where: str
) -> tuple[LayerShape, ...]:
  # Late releases of transformers 5 pad the keys with zeros when they save: "05".
  try:
    per_layer = {int(key): dict(fields) for key, fields in (raw.get('per_layer_config') or {}).items()}
  except (AttributeError, TypeError, ValueError):
    raise InputError(
      f'{where}: per_layer_config in config.json must map layer numbers to widths: export it again'
    ) from None
  for i, fields in per_layer.items():
    unknown = sorted(fields.keys() - widest)
    if unknown or i >= depth:
      found = f'the field {unknown[0]!r}' if unknown else f'layer {i} of {depth}'
      raise InputError(f'{where}: per_layer_config in config.json has {found}, which is not supported')
  layers = [widest | per_layer.get(i, {}) for i in range(depth)]
  return tuple(
    LayerShape(w['num_attention_heads'], w['num_key_value_heads'], w['intermediate_size']) for w in layers
  )


def _supported_family(raw: dict[str, Any], where: str) -> str:
  model_type = raw.get('model_type')
  family = _MODEL_TYPES.get(str(model_type))
  if family is None:
    asks = ' and asks to run its own code, which is never done' if 'auto_map' in raw else ''
    raise InputError(
      f'{where}: model_type {model_type!r} is not supported{asks}; supported: '
      f'{", ".join(sorted(_MODEL_TYPES))}'
    )
  refused = {
    'hidden_act': raw.get('hidden_act', 'silu') not in ('silu', 'swish'),
    'attention_bias': bool(raw.get('attention_bias')),
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
      raise InputError(
        f'{where}: {field} = {raw.get(field)!r} in config.json is not supported; use a checkpoint without it'
      )
  return family


def _sliding_window_in_use(raw: dict[str, Any], family: str) -> bool:
  if 'sliding_attention' in (raw.get('layer_types') or ()):
    return True
  if family != 'mistral' and not raw.get('use_sliding_window'):
    return False
  window = raw.get('sliding_window', 4096)  # transformers' default for all of them
  return window is not None and window < raw.get('max_position_embeddings', 2048)


def _rope(raw: dict[str, Any], where: str) -> RopeConfig:
  # Where both are present, transformers 5 takes the old one.
  parameters = (raw.get('rope_parameters') or {}) | (raw.get('rope_scaling') or {})
  theta = float(raw.get('rope_theta') or parameters.get('rope_theta') or 10000.0)
  kind = parameters.get('rope_type', parameters.get('type', 'default'))
  if kind == 'default':
    return RopeConfig(theta)
  if kind != 'llama3':
    raise InputError(
      f'{where}: rope_type {kind!r} in config.json is not supported: only default and llama3 are'
    )
  try:
    scaling = Llama3Scaling(
      factor=float(parameters['factor']),
      low_freq_factor=float(parameters['low_freq_factor']),
      high_freq_factor=float(parameters['high_freq_factor']),
      original_max_position=int(parameters['original_max_position_embeddings']),
    )
  except KeyError as error:
    raise InputError(f'{where}: the llama3 rope scaling in config.json lacks {error}') from None
  return RopeConfig(theta, scaling)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
  """`config.json` fields of the stock architecture with the widest layer's values.

  Both spellings of the rotary fields are written: transformers 4.57 and MLX-LM read a file with
  only `rope_parameters` as theta 10000, silently. For a uniform config this is a complete stock
  config.json; `adapt_jax/export/hf.py` adds what per-layer widths need.
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
    'architectures': [_ARCHITECTURES[config.family]],
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
  if config.rope.scaling:  # a null here only brings a deprecation warning
    fields['rope_scaling'] = rope
  if config.family == 'mistral':
    fields['sliding_window'] = None
  if config.family in ('qwen2', 'qwen3'):
    fields['use_sliding_window'] = False
  if config.family in ('llama', 'qwen3'):
    fields['attention_bias'] = False
  return fields
