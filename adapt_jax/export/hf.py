"""Writes a model as a Hugging Face directory for transformers and programs built on it."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from adapt_jax.export.float16 import check_weights
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.files import new_directory, write_text
from adapt_jax.models.formats.hf_config import config_to_hf
from adapt_jax.models.formats.hf_weights import save_params
from adapt_jax.models.network.llama import Params

_CODE = pathlib.Path(__file__).parent / 'hf_code'
_MLX_FILE = 'mlx_adapt.py'
_WIDTHS = {
  'num_attention_heads': 'num_heads',
  'num_key_value_heads': 'num_kv_heads',
  'intermediate_size': 'ffn',
}


def write_hf(
  config: ModelConfig,
  params: Params,
  directory: str | pathlib.Path,
  *,
  tokenizer: Any = None,
  dtype: Any = None,
  generation: dict[str, Any] | None = None,
  code: bool = True,
) -> None:
  """Writes weights, config, tokenizer and, if no stock class can build the layers, the code that does.

  `directory` is complete or absent: an existing one is replaced at the end; an error leaves it unchanged.
  A stock architecture loads without `trust_remote_code`; other models need it, also in vLLM and MLX-LM,
  which load the same directory. `dtype` None keeps each array's own. `generation` holds fields of
  generation_config.json that override the tokenizer's, such as a chat model's list of `eos_token_id`.
  Without `code`, no code file is written for MLX-LM if its stock model differs from the stock class of
  transformers.

  Every process must call this, since parameters may be sharded over processes; the first one writes.
  Raises InputError for a weight beyond the range of float16.
  """
  dtype = None if dtype is None else np.dtype(dtype)
  check_weights(config, params, dtype)
  if jax.process_index() != 0:
    save_params(config, params, None, dtype)
    return
  name = (dtype or params['embed'].dtype).name
  ids = {f: getattr(tokenizer, f, None) for f in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
  # The old name is read by transformers before 4.56 and other programs.
  fields = config_to_hf(config) | {'dtype': name, 'torch_dtype': name} | ids
  with new_directory(directory) as new:
    save_params(config, params, new, dtype)
    if not _stock(config):
      fields |= _own_architecture(config)
      # If it does not know the model_type, transformers 5 fails on this old name when it opens the
      # tokenizer; the exported code reads the new one in transformers 4 too.
      fields.pop('rope_scaling', None)
      for file in ('configuration_adapt.py', 'modeling_adapt.py'):
        shutil.copy(_CODE / file, new)
    if code and needs_mlx_code(config):
      fields['model_file'] = _MLX_FILE
      shutil.copy(_CODE / _MLX_FILE, new)
    _write_json(new / 'config.json', fields)
    given = {k: v for k, v in ids.items() if v is not None}
    _write_json(new / 'generation_config.json', given | (generation or {}))
    if tokenizer is not None:
      tokenizer.save_pretrained(new)
      _use_old_names(new / 'tokenizer_config.json')


def _stock(config: ModelConfig) -> bool:
  """Whether a stock class of transformers computes this model.

  None has a bias only on down_proj, or a sliced stream.
  """
  return config.uniform and not config.output_bias and not config.sliced_from and not _refused(config)


def _refused(config: ModelConfig) -> bool:
  """Whether the stock configuration refuses the model, since its heads do not divide hidden_size."""
  heads = max(shape.num_heads for shape in config.layers)
  return config.traits.heads_divide and bool(config.hidden_size % heads)


def needs_mlx_code(config: ModelConfig) -> bool:
  """Whether our code for MLX-LM computes this model, and no stock model of MLX-LM does."""
  if config.traits.mlx is None or config.sliced_from:
    return False
  lacking = {
    'head_dim': config.hidden_size != config.layers[0].num_heads * config.head_dim,
    'biases': config.qkv_bias,
  }
  return not _stock(config) or lacking.get(config.traits.mlx, False)


def has_stock_type(config: ModelConfig) -> bool:
  """Whether config.json names a model_type of transformers, so that its tokenizer opens without a question.

  Late transformers 5 asks whether to run code before it opens the tokenizer of a model_type that it does not
  know. A known one is safe where no stock class accepts the weights, since layers differ in width.
  """
  return _stock(config) or not (config.uniform or config.sliced_from or _refused(config))


def _own_architecture(config: ModelConfig) -> dict[str, Any]:
  """Fields of config.json that name the exported code and describe how it differs from the stock class."""
  widest = config_to_hf(config)
  traits = config.traits
  # vLLM computes the logits of models that it does not know by itself, and scales them only by this field.
  scaled = {'logit_scale': 1 / config.logit_divisor} if config.logit_divisor != 1 else {}
  narrower = {
    str(i): {k: getattr(shape, name) for k, name in _WIDTHS.items() if getattr(shape, name) != widest[k]}
    for i, shape in enumerate(config.layers)
  }
  return {
    'model_type': config.family if has_stock_type(config) else f'adapt_{config.family}',
    'allow_global_per_layer_attribute_access': True,  # else late transformers 5 fails on a stock model_type
    'architectures': [f'Adapt{traits.stock}ForCausalLM'],
    'auto_map': {
      'AutoConfig': f'configuration_adapt.Adapt{traits.base_name}Config',
      'AutoModel': f'modeling_adapt.Adapt{traits.base_name}Model',  # vLLM builds this one
      'AutoModelForCausalLM': f'modeling_adapt.Adapt{traits.stock}ForCausalLM',
    },
    'per_layer_config': {i: widths for i, widths in narrower.items() if widths},
    'output_bias': config.output_bias,
    **scaled,
  } | ({'sliced_from': config.sliced_from} if config.sliced_from else {})


def _use_old_names(path: pathlib.Path) -> None:
  """Rewrites a tokenizer's config with names that transformers 4 also knows; 5 reads both."""
  fields = json.loads(path.read_text(encoding='utf-8'))
  if fields.get('tokenizer_class') == 'TokenizersBackend':
    fields['tokenizer_class'] = 'PreTrainedTokenizerFast'
  if isinstance(fields.get('extra_special_tokens'), list):
    fields['additional_special_tokens'] = fields.pop('extra_special_tokens')
  fields.setdefault('model_input_names', ['input_ids', 'attention_mask'])
  _write_json(path, fields)


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
  write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + '\n')
