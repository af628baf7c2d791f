"""Mode generate: the output of a model for prompts."""

from collections.abc import Sequence

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
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.modes.mode import Mode


def run(options: RunOptions, prompts: Sequence[str]) -> None:
  """Prints the output of model.source for each prompt, and its speed."""
  g, dtype = options.generate, compute_dtype(options.model.dtype)
  if not prompts or not all(prompts):
    raise InputError("--prompt is empty: --mode=generate needs --prompt='some text', one or more times")
  source = open_source(options.model.source)
  config = source.config
  check_model(config)
  tokenizer = with_template(source.load_tokenizer(), options.data.chat_template)
  ids = encode_prompts(prompts, tokenizer, g.chat)
  check_prompts(config, ids, g.max_new_tokens)
  form = (
    'rendered with the chat template' if g.chat and tokenizer.chat_template else 'continued as plain text'
  )
  print(f'{source.name}: {len(prompts)} prompts {form}, up to {g.max_new_tokens:,} new tokens', flush=True)
  params = load_source(source, dtype)
  generator = Generator(config, params, compiler=Compiler(), dtype=dtype)
  stop = stop_ids(source.generation, tokenizer)
  with Progress('generate', len(ids) * g.max_new_tokens, 'tokens') as progress:
    new = generator.generate(ids, g.max_new_tokens, Sampling(g.temperature), stop, options.seed, progress)
  t = generator.timings
  print(
    f'{source.name}: {count_params(config):,} parameters, {dtype.name}: prefill {t.prefill_rate:,.1f} '
    f'tokens/s, decode {t.decode_rate:,.1f} tokens/s, compiled in {t.compile_seconds:.1f} s',
    flush=True,
  )
  for prompt, tokens in zip(prompts, new, strict=True):
    print(f'\n== {prompt}\n{tokenizer.decode(tokens, skip_special_tokens=True)}')


MODE = Mode(
  'generate',
  'continue --prompt=TEXT, which may be repeated, with model.source',
  run,
  reads=('seed', 'model', 'data.chat_template', 'generate', 'mesh'),
)
