"""Mode narrow: gives a model a smaller hidden size, the same in all layers, and writes it."""

from adapt_jax.config.identity import WRITTEN
from adapt_jax.config.options import RunOptions
from adapt_jax.export.push import check_hub
from adapt_jax.export.writer import check_formats, check_tokenizer, origin, written_dtype
from adapt_jax.machine import mesh
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.processes import decide
from adapt_jax.models.config import ModelConfig
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.backend import compute_dtype
from adapt_jax.modes.accel import untrained
from adapt_jax.modes.export import write
from adapt_jax.modes.mode import Mode
from adapt_jax.pipeline.loader import Loader
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning import narrow, serving_widths
from adapt_jax.pruning.programs import micro_batch


def run(options: RunOptions, workdir: Workdir, command: str) -> None:
  """Narrows model.source on the calibration rows, and writes it. Raises InputError before any work."""
  source, calibration = open_source(options.model.source), options.prune.calibration
  config, width = _checked(options, source.config), options.narrow.hidden
  loader = Loader(options, source, source.load_tokenizer())
  check_tokenizer(options.export, loader.tokenizer)
  blocks, report = loader.calibration(), origin(source).report()
  rows = blocks.draw(calibration.samples, options.seed, 0)
  decide(lambda: check_hub(options.export))
  with workdir.claimed():
    params = narrow.narrow(
      source.config,
      mesh.load_source(source, None),
      mesh.put_rows(rows, lambda ids: (blocks.tokens[ids],))[0],
      width,
      micro_batch=micro_batch(calibration),
      dtype=compute_dtype(options.model.dtype),
      compiler=Compiler(),
    )
    beside = {'tokenizer': loader.tokenizer, 'generation': source.generation, 'report': report}
    beside['dtype'] = written_dtype(options.export, source, trained=False)
    write(options, workdir, command, config, params, **beside)


def _checked(options: RunOptions, config: ModelConfig) -> ModelConfig:
  """The narrowed config. Raises InputError if the model cannot be narrowed to it."""
  width = options.narrow.hidden
  narrow.check(config, width, 'narrow.hidden')
  serving_widths.check_hidden(options.prune.serve, width)
  small = narrow.narrowed_config(config, width)
  for of in (config, small):
    mesh.check_model(of)
  mesh.check_batches(options)
  check_formats(options.export, small)
  return small


MODE = Mode(
  'narrow',
  'give model.source the hidden size narrow.hidden',
  run,
  result=('seed', 'model', 'data', 'prune.calibration', 'narrow', *WRITTEN),
  reads=('export.push', 'mesh', 'prune.serve'),
  settle=untrained,
  several_processes=True,
)
