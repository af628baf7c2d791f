"""safetensors files, whose tensors are read as pages of the file and written one after another."""

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from adapt_jax.models.formats import safetensors
from adapt_jax.models.formats.hf_weights import load_params, save_params, stored_params
from adapt_jax.models.formats.safetensors import SafetensorsReader, write_tensors
from tests.support.helpers import UNIFORM, random_params, save_checkpoint, tiny_config

CONFIG = tiny_config(layers=UNIFORM)


def bits(tree):
  return [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize('chunk', [5, 1 << 17])
def test_the_library_reads_what_is_written(chunk, tmp_path, monkeypatch):
  """Tensors that are contiguous, that are not, that are converted, and an empty one."""
  monkeypatch.setattr(safetensors, '_CHUNK', chunk)
  rng = np.random.default_rng(0)
  draw = {
    'a': rng.standard_normal((3, 7)).astype(np.float32),
    'b': rng.standard_normal((7, 3)).astype(np.float32).T,
    'c': rng.standard_normal((2, 5)).astype(np.float32),
    'd': rng.standard_normal(11).astype(np.float16),
    'e': np.zeros((0, 4), np.float32),
  }
  dtypes = dict(zip(draw, ('float32', 'float32', 'bfloat16', 'float16', 'float32'), strict=True))
  write_tensors(
    tmp_path / 'x', {n: (draw[n].shape, np.dtype(dtype)) for n, dtype in dtypes.items()}, draw.__getitem__
  )
  found = load_file(tmp_path / 'x')
  assert bits(found) == bits({n: x.astype(dtypes[n]) for n, x in draw.items()})
  assert safe_open(tmp_path / 'x', framework='np').metadata() == {'format': 'pt'}


def test_wide_numbers_go_before_narrow_ones(tmp_path):
  """A narrow tensor of odd length would put a wide one after it at an odd address."""
  params = random_params(CONFIG) | {'norm': np.ones(48, np.float32)}
  params['embed'] = params['embed'].astype(ml_dtypes.bfloat16)
  save_params(CONFIG, params, tmp_path)
  handle = safe_open(tmp_path / 'model.safetensors', framework='np')
  kinds = [handle.get_slice(name).get_dtype() for name in handle.offset_keys()]
  assert kinds == sorted(kinds, reverse=True) and set(kinds) == {'F32', 'BF16'}


def test_pages_of_a_file_are_read_and_never_kept_by_a_device(tmp_path):
  """Wherever the header's length puts them: JAX would take over memory at multiples of 64 bytes."""
  save_checkpoint(tmp_path, CONFIG, random_params(CONFIG), dtype='bfloat16')
  path = tmp_path / 'model.safetensors'
  content = path.read_bytes()
  end = 8 + int.from_bytes(content[:8], 'little')
  expected = bits(load_params(CONFIG, SafetensorsReader(tmp_path)))
  for pad in range(64):
    size = (end - 8 + pad).to_bytes(8, 'little')
    path.write_bytes(size + content[8:end] + b' ' * pad + content[end:])
    reader = SafetensorsReader(tmp_path)
    params = load_params(CONFIG, reader)
    pages = jax.tree.map(np.asarray, stored_params(CONFIG, reader))
    assert bits(pages) == bits(params) == expected
    with open(path, 'r+b') as file:
      file.seek(end + pad)
      file.write(bytes(len(content) - end))
    assert bits(params) == expected
    assert not any(np.asarray(x, np.float32).any() for x in jax.tree.leaves(pages))
