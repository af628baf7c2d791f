"""Mode trim: keeps the tokens of a text in the vocabulary of a model, and writes the smaller model."""

from adapt_jax.config.identity import WRITTEN
from adapt_jax.config.options import RunOptions
from adapt_jax.config.values import SELF
from adapt_jax.data.chat_templates import with_template
from adapt_jax.data.documents import check_source
from adapt_jax.data.token_cache import token_directory, used_ids
from adapt_jax.export.push import check_hub
from adapt_jax.export.writer import check_formats, check_tokenizer, origin, written_dtype
from adapt_jax.machine.mesh import check_model, load_source
from adapt_jax.machine.processes import decide, say
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes.export import write
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.vocabulary import trim
from adapt_jax.pipeline.workdir import Workdir


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Reads all texts of prune.calibration.source; writes the model with their tokens. Raises InputError."""
  field = 'prune.calibration.source'
  entries = tuple(entry for entry in options.prune.calibration.source if entry != SELF)
  check_source(entries, field, **options.data.fields)
  source = open_source(options.model.source)
  check_model(source.config)
  tokenizer = with_template(source.load_tokenizer(), options.data.chat_template)
  used = used_ids(token_directory(options.data), entries, tokenizer, field=field, **options.data.fields)
  kept = trim(source.config, tokenizer, source.generation, used)
  say(
    f'{source.name}: {kept.config.vocab_size:,} of {source.config.vocab_size:,} token ids are kept, '
    f'{count_params(kept.config):,} of {count_params(source.config):,} parameters'
  )
  check_formats(options.export, kept.config)
  check_tokenizer(options.export, kept.tokenizer)
  report = origin(source).report()
  decide(lambda: check_hub(options.export))
  with workdir.claimed():
    beside = {'tokenizer': kept.tokenizer, 'generation': kept.generation, 'report': report}
    beside['dtype'] = written_dtype(options.export, source, trained=False)
    write(options, workdir, command, kept.config, kept.cut(load_source(source, None)), **beside)


MODE = Mode(
  'trim',
  'remove the tokens from the vocabulary that prune.calibration.source does not use',
  run,
  result=('model.source', 'data', 'prune.calibration.source', *WRITTEN),
  reads=('export.push', 'mesh'),
  several_processes=True,
)
