"""Mode convert: a checkpoint of any supported form to a Hugging Face directory, unchanged."""

import json

import jax.numpy as jnp

from adapt_jax.config import RunOptions
from adapt_jax.export.hf import write_hf
from adapt_jax.report import versions
from adapt_jax.workdir import Workdir
from models.config import count_params
from models.files import write_text
from models.source import open_source


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Writes WORKDIR/hf; with export.dtype = auto every tensor keeps its bits."""
  source = open_source(options.model.source)
  tokenizer = source.load_tokenizer()
  workdir.claim()
  write_hf(
    source.config,
    source.load_params(),
    workdir.hf,
    tokenizer=tokenizer,
    dtype=None if options.export.dtype == 'auto' else jnp.dtype(options.export.dtype),
    generation=source.generation,
  )
  params = count_params(source.config)
  report = {
    'model': {'source': source.name, 'params_before': params},
    'command': command,
    'versions': versions(),
  }
  write_text(workdir.report, json.dumps(report, indent=2) + '\n')
  print(f'{params:,} parameters written to {workdir.hf}')
