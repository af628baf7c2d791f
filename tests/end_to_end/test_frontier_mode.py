"""Mode frontier: figures of the real llama.cpp beside those of our evaluator, resuming, and bad input."""

import csv

import jax.numpy as jnp
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.evaluation import llama_cpp
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.export.hf import write_hf
from adapt_jax.machine.compiler import Compiler
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import frontier
from adapt_jax.pipeline.loader import Loader
from tests.support import runs
from tests.support.helpers import logits, new_params, refused
from tests.support.llama_cpp import needs_llama_cpp
from tests.support.tokenizers_for_tests import tiny_tokenizer

pytestmark = needs_llama_cpp
REPEATS = 2


def write_smaller(path, family='llama', vocab_size=None):
  """A model whose layers have different widths."""
  tokenizer = tiny_tokenizer()
  shapes = LayerShape(6, 3, 32), LayerShape(4, 2, 48)
  ids = vocab_size or len(tokenizer)
  config = ModelConfig(
    family, ids, runs.HIDDEN, 8, shapes, RopeConfig(1e4), 1e-5, True, qk_norm=family == 'qwen3'
  )
  write_hf(config, new_params(config, seed=1), path, tokenizer=tokenizer)
  return str(path)


def make_config(files, smaller, *types):
  config = runs.make_config(files)
  config.frontier.update({'models': (smaller,), 'types': types, 'threads': 1})
  config.bench.update({'prompt_length': 16, 'new_tokens': 2, 'repeats': REPEATS})
  return config


def start(config, path):
  return runs.in_process(config, path, 'frontier', command='adapt-jax <x>')


@pytest.fixture(scope='module')
def smaller(tmp_path_factory):
  return write_smaller(tmp_path_factory.mktemp('smaller') / 'model')


@pytest.fixture(scope='module')
def finished(files, smaller, tmp_path_factory):
  """A directory that was killed after one file, again after a round of speeds, and then got another type."""
  path = tmp_path_factory.mktemp('finished') / 'out'
  measured, timed, quality, speed = [], [], llama_cpp.quality, llama_cpp.speed

  def until_killed(calls, measure, last):
    def call(file, *args, **options):
      calls.append(file.name)
      if len(calls) == last:
        raise KeyboardInterrupt
      return measure(file, *args, **options)

    return call

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(llama_cpp, 'quality', until_killed(measured, quality, 2))
    patch.setattr(llama_cpp, 'speed', until_killed(timed, speed, 3))
    for _ in range(2):
      with pytest.raises(KeyboardInterrupt):
        start(make_config(files, smaller, 'bf16'), path)
    start(make_config(files, smaller, 'bf16'), path)
    report = start(make_config(files, smaller, 'bf16', 'q8_0'), path)
  return path, report, measured, timed


def test_each_file_is_measured_once_and_speeds_in_rounds_over_all(finished):
  path, report, measured, timed = finished
  # The second one was killed; for another type the reference is measured again, as its file was deleted.
  assert measured == ['model-BF16.gguf'] * 3 + ['model-BF16.gguf'] + ['model-Q8_0.gguf'] * 2
  assert len(timed) == 1 + 2 * REPEATS + 4 * REPEATS
  assert [row['type'] for row in report['rows']] == ['BF16', 'Q8_0'] * 2
  assert not [*path.glob('*.np?')]  # large
  for row in report['rows']:
    assert (path / row['file']).stat().st_size == row['bytes']
    for speed in (row['prefill'], row['decode']):
      assert 0 < speed['min'] <= speed['median'] <= speed['max']
  assert len([*csv.DictReader((path / 'frontier.csv').open())]) == 4
  assert (path / 'report.html').read_text().count('<svg') == 2


def test_figures_are_those_of_our_evaluator(finished, files, smaller):
  """In 16 bits. llama.cpp rounds the input of each product to bfloat16, which has errors of 2^-9 / sqrt(3).

  On the way of a number there are four products in each of two layers, and the head: relative to the logits
  the error is sqrt(9) as large. The loss of a token is the difference of two numbers of their size. The mean
  over n tokens errs by 1 / sqrt(n) of that; four standard errors are allowed.
  """
  path, report, *_ = finished
  options = from_dict(make_config(files, smaller, 'bf16').to_dict())
  source = open_source(options.model.source)
  (blocks,) = Loader(options, source, source.load_tokenizer()).evaluation().values()
  evaluator = Evaluator(blocks, 4, compiler=Compiler(), dtype=jnp.float32)
  reference, rows = None, [row for row in report['rows'] if row['type'] == 'BF16']
  assert rows[0]['kl'] == rows[0]['loss_increase'] == 0 < rows[1]['kl']
  for row in rows:
    model = open_source(str(path / row['file']))
    params = model.load_params(jnp.float32)
    size = float(jnp.std(logits(model.config, params, blocks.tokens[:4])))
    tolerance = 4 * size * 2**0.5 * 9**0.5 * 2**-9 / 3**0.5 / blocks.targets.sum() ** 0.5
    ours = evaluator.perplexity(model.config, params, 'ours')
    found = row['texts']['text']
    assert abs(jnp.log(found['perplexity'] / ours)) < tolerance
    reference = reference or evaluator.reference(model.config, params, 'reference')
    kl = evaluator.divergence(model.config, params, reference, 'ours')
    assert abs(found['kl'] - kl) < 2 * tolerance  # both models err


def test_models_of_equal_layers_only_are_padded(tmp_path):
  """llama.cpp computes different widths of a llama, and not of a Qwen3."""
  for family, form in {'llama': 'gguf', 'qwen3': 'gguf_padded'}.items():
    source = open_source(write_smaller(tmp_path / family, family))
    assert frontier._open(source, source.load_tokenizer(), '', ('BF16',)).export.formats == (form,)


def test_what_cannot_be_compared_is_refused_before_any_work(files, smaller, tmp_path, monkeypatch):
  other = write_smaller(tmp_path / 'other', vocab_size=400)
  message = refused(start, make_config(files, other, 'bf16'), tmp_path / 'out')
  assert 'other tokens than model.source' in message
  config = make_config(files, smaller, 'bf16')
  config.evaluate.source = ()
  assert 'evaluate.source is empty' in refused(start, config, tmp_path / 'out')
  monkeypatch.setattr(llama_cpp, '_PACKAGE', 'no_such_package')
  assert 'adapt-jax[quantise]' in refused(start, make_config(files, smaller, 'bf16'), tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_what_llama_cpp_cannot_run_is_one_line(tmp_path):
  file = tmp_path / 'broken.gguf'
  file.write_bytes(b'GGUF')
  message = refused(llama_cpp.speed, file, threads=1, prompt_length=2, new_tokens=2, seed=0)
  assert str(file) in message and 'it cannot be loaded' in message
