"""Trims the vocabulary of a run's dense model to the tokens of a text (`prune.vocab`)."""

from adapt_jax.config.options import RunOptions
from adapt_jax.data.chat_templates import with_template
from adapt_jax.data.used_ids import used_ids
from adapt_jax.generation.sampling import stop_ids
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.config import count_params
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import Source
from adapt_jax.models.formats.trimmed_source import trimmed_source
from adapt_jax.models.formats.trimmed_tokenizer import needed_ids, trim_tokenizer


def with_vocabulary(options: RunOptions, source: Source) -> Source:
  """The source with the tokens of `prune.vocab` and those that these need; itself if there is none.

  The first process reads the text. Raises InputError for a text that cannot be read, and for a tokenizer that
  cannot be trimmed.
  """
  entries, data = options.prune.vocab, options.data
  if not entries:
    return source
  tokenizer = source.load_tokenizer()
  field, fields = 'prune.vocab', {'text_field': data.text_field, 'messages_field': data.messages_field}
  rendering = with_template(tokenizer, data.chat_template)
  used = decide(lambda: used_ids(entries, rendering, field, **fields))
  try:
    ids = needed_ids(tokenizer, {*used, *stop_ids(source.generation, tokenizer)})
    found = trimmed_source(source, ids, tokenizer, trim_tokenizer(tokenizer, ids))
  except InputError as error:
    raise InputError(f'{field}: {error}') from None
  say(
    f'{source.name}: {found.config.vocab_size:,} of {source.config.vocab_size:,} token ids are kept, '
    f'{count_params(found.config):,} of {count_params(source.config):,} parameters'
  )
  return found
