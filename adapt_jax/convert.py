"""Mode convert: a checkpoint of any supported form to a Hugging Face directory, unchanged."""

import jax.numpy as jnp

from adapt_jax.config import RunOptions
from adapt_jax.export.hf import write_hf
from adapt_jax.workdir import Workdir
from models.config import count_params
from models.source import open_source


def run(options: RunOptions, workdir: Workdir) -> None:
  """Writes WORKDIR/hf; with export.dtype = auto every tensor keeps its bits."""
  source = open_source(options.model.source)
  tokenizer = source.load_tokenizer()
  workdir.claim()
  dtype = None if options.export.dtype == 'auto' else jnp.dtype(options.export.dtype)
  write_hf(
    source.config,
    source.load_params(),
    workdir.hf,
    tokenizer=tokenizer,
    dtype=dtype,
    generation=source.generation(),
  )
  print(f'{count_params(source.config):,} parameters written to {workdir.hf}')
