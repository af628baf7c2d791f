"""Weights move in slices: what is read, what is held at once, and what a failure leaves behind."""

import os
import pathlib
import resource
import socket
import subprocess
import sys

import numpy as np
import pytest

from adapt_jax.export.gguf import write_gguf
from adapt_jax.export.hf import write_hf
from adapt_jax.models.errors import disk_full
from adapt_jax.models.formats.hf_weights import leaves, load_params, save_params, stored_params
from adapt_jax.models.formats.source import open_source
from tests.support.helpers import random_params, tiny_config
from tests.support.streaming import CountingReader, divisible_config, write_checkpoints
from tests.support.tokenizers_for_tests import tiny_tokenizer

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
  directory = tmp_path_factory.mktemp('checkpoints')
  write_checkpoints(directory)
  return directory


def free_port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


def test_two_processes_load_and_save_a_model_sharded_over_both(checkpoints, tmp_path):
  command = [sys.executable, '-m', 'tests.support.streaming_child']
  rest = [str(free_port()), str(checkpoints), str(tmp_path)]
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  processes = [
    subprocess.Popen([*command, str(i), *rest], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  try:
    errors = [process.communicate(timeout=300)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert not any(process.returncode for process in processes), '\n'.join(e[-3000:] for e in errors)
  for path in checkpoints.iterdir():
    source = open_source(str(path))
    write_hf(source.config, source.load_params(), tmp_path / 'plain')
    sharded = tmp_path / f'{path.name}-0'
    assert {p.name: p.read_bytes() for p in sharded.iterdir()} == {
      p.name: p.read_bytes() for p in (tmp_path / 'plain').iterdir()
    }
    assert not (tmp_path / f'{path.name}-1').exists()


@pytest.mark.parametrize('name', ['qwen2', 'llama.gguf'])
def test_one_tensor_of_the_file_is_held_at_a_time(name, checkpoints, tmp_path):
  """When all are loaded, and when a checkpoint is written as it is."""
  source = open_source(str(checkpoints / name))

  def count(use):
    reader = CountingReader(source.reader, source.config)
    use(reader)
    assert all((times == 1).all() for times in reader.times.values())
    assert reader.peak == reader.largest() and reader.alive == 0

  count(lambda reader: load_params(source.config, reader, 'float16'))
  count(lambda reader: save_params(source.config, stored_params(source.config, reader), tmp_path))


@pytest.mark.parametrize('name', ['qwen2', 'llama.gguf'])
def test_any_part_of_a_tensor_is_what_the_whole_one_has_there(name, checkpoints):
  """In .gguf files, blocks of 32 columns are cut, and so are heads, whose rows lie in another order."""
  source = open_source(str(checkpoints / name))
  rng, reader = np.random.default_rng(0), source.reader
  for leaf in leaves(source.config):
    whole = reader.read(leaf.name)
    for _ in range(4):
      starts = [int(rng.integers(n)) for n in leaf.hf_shape]
      index = tuple(slice(k, int(rng.integers(k, n)) + 1) for k, n in zip(starts, leaf.hf_shape, strict=True))
      part = reader.read(leaf.name, index)
      assert part.dtype == whole.dtype
      np.testing.assert_array_equal(part, whole[index], err_msg=f'{leaf.name} {index}')


def test_only_the_first_of_the_folded_axes_may_be_split():
  query = next(leaf for leaf in leaves(divisible_config('llama')) if leaf.path[-1] == 'q')
  K, G, H, D = query.shape
  assert query.hf_index(((1, 2), (0, G), (0, H), (8, 16))) == (slice(G * H, 2 * G * H), slice(8, 16))
  with pytest.raises(ValueError):
    query.hf_index(((0, K), (0, G), (0, H // 2), (0, D)))


@pytest.mark.parametrize('write', [write_hf, write_gguf])
def test_a_full_disk_leaves_what_was_there(write, tmp_path):
  config = tiny_config(vocab_size=320)
  old = tmp_path / ('model/old' if write is write_hf else 'model')
  old.parent.mkdir(exist_ok=True)
  old.write_text('old')
  options = {} if write is write_hf else {'kind': 'F32', 'name': 'tiny'}
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # much as on a full disk
  try:
    with pytest.raises(OSError, match='File too large') as failure:
      write(config, random_params(config), tmp_path / 'model', tokenizer=tiny_tokenizer(), **options)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert disk_full(failure.value)
  assert [p for p in tmp_path.rglob('*') if p.is_file()] == [old] and old.read_text() == 'old'
