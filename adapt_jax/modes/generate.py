"""Mode generate: the output of a model, and of a second one for comparison, for prompts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from adapt_jax.config.options import RunOptions
from adapt_jax.data.chat_templates import with_template
from adapt_jax.data.tokenise import encode_prompts
from adapt_jax.generation.generator import Generator, check_prompts
from adapt_jax.generation.sampling import Sampling, stop_ids
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.mesh import check_model, load_source
from adapt_jax.machine.progress import Progress
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import Source, open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.modes.mode import Mode


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A model with checked prompts, whose weights are not loaded yet."""

  source: Source
  tokenizer: Any
  prompts: list[list[int]]


def _open(options: RunOptions, name: str, field: str, prompts: Sequence[str]) -> _Opened:
  g = options.generate
  source = open_source(name, field)
  check_model(source.config)
  tokenizer = with_template(source.load_tokenizer(), options.data.chat_template)
  ids = encode_prompts(prompts, tokenizer, g.chat)
  check_prompts(source.config, ids, g.max_new_tokens)
  return _Opened(source, tokenizer, ids)


def _continue(options: RunOptions, model: _Opened) -> list[str]:
  """Returns the model's texts; prints its name, size and speed."""
  g, config, dtype = options.generate, model.source.config, compute_dtype(options.model.dtype)
  params = load_source(model.source, dtype)
  generator = Generator(config, params, compiler=Compiler(), dtype=dtype, max_batch=g.batch)
  sampling = Sampling(g.temperature, g.top_k, g.top_p)
  stop = stop_ids(model.source.generation, model.tokenizer)
  with Progress('generate', len(model.prompts) * g.max_new_tokens, 'tokens') as progress:
    new = generator.generate(model.prompts, g.max_new_tokens, sampling, stop, options.seed, progress=progress)
  t = generator.timings
  print(
    f'{model.source.name}: {count_params(config):,} parameters, {dtype.name}: prefill {t.prefill_rate:,.1f} '
    f'tokens/s, decode {t.decode_rate:,.1f} tokens/s, compiled in {t.compile_seconds:.1f} s',
    flush=True,
  )
  return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]


def run(options: RunOptions, prompts: Sequence[str]) -> None:
  """Prints the output of model.source, and of generate.dense if given, for each prompt."""
  g = options.generate
  if not prompts or not all(prompts):
    raise InputError("--prompt is empty: --mode=generate needs --prompt='some text', one or more times")
  names = {'generate.dense': g.dense, 'model.source': options.model.source}
  models = [
    _open(options, name, field, prompts) for field, name in names.items() if name or field == 'model.source'
  ]
  for model in models:
    chat = g.chat and model.tokenizer.chat_template
    form = 'rendered with the chat template' if chat else 'continued as plain text'
    print(
      f'{model.source.name}: {len(prompts)} prompts {form}, up to {g.max_new_tokens:,} new tokens', flush=True
    )
  texts = [_continue(options, model) for model in models]
  for i, prompt in enumerate(prompts):
    print(f'\n== {prompt}')
    for model, found in zip(models, texts, strict=True):
      print(f'-- {model.source.name}\n{found[i]}' if len(models) > 1 else found[i])


MODE = Mode(
  'generate',
  'continue --prompt=TEXT, which may be repeated, with model.source',
  run,
  reads=('seed', 'model', 'data.chat_template', 'generate', 'mesh'),
)
