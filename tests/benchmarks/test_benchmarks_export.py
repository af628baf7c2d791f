"""benchmarks/export.py at toy size: its checkpoint is a real one, and every program gets it across."""

import json
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import open_source
from benchmarks import export


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp('checkpoint') / 'source'
  return path, export.write_checkpoint(path, export.SHAPES['toy'], 3)


def weights(directory):
  tensors = {}
  for file in directory.glob('*.safetensors'):
    tensors |= load_file(file)
  return {name: x.tobytes() for name, x in tensors.items()}


def test_the_checkpoint_is_one_of_bf16_in_several_files(checkpoint):
  path, sizes = checkpoint
  source = open_source(str(path))
  assert len(source.reader.files) > 1 and source.dtype == 'bfloat16' and not source.config.tie_embeddings
  assert 2 * count_params(source.config) == sum(sizes.values())
  assert source.load_tokenizer()('the lazy cat')['input_ids'] == [2, 9, 0]
  values = np.concatenate([x.ravel() for x in source.load_params('float32')['layers'][1]['mlp'].values()])
  assert abs(values).min() > 0.001 and abs(values).max() < 0.1 and abs(values.mean()) < 0.001


def test_the_shape_is_that_of_the_published_model():
  config = export.SHAPES['llama-3.1-8b'].tensors(32)
  assert sum(np.prod(shape) for shape in config.values()) == 8_030_261_248


def test_every_program_gets_it_across(checkpoint, tmp_path):
  pytest.importorskip('torch')
  path, sizes = checkpoint
  expected = weights(path)
  runs = {}
  for name, command in export.commands(path, tmp_path / 'out').items():
    runs[name] = [export.run(command)]
    model = next(p for p in (tmp_path / 'out/hf', tmp_path / 'out') if p.exists())
    assert weights(model) == expected
    (tmp_path / 'out').rename(tmp_path / name)
  (ours,) = runs['ours']
  assert ours.answer.keys() == {'read', 'write', 'check', 'anonymous_bytes'}
  parts = [ours.answer[part] for part in ('read', 'write', 'check')]
  assert all(seconds > 0 for seconds, _ in parts) and sum(seconds for seconds, _ in parts) < ours.seconds
  assert runs['transformers'][0].answer['moved'][0] < runs['transformers'][0].seconds
  found = export.table(runs, export.limits(tmp_path, 10_000), sizes)
  assert len(re.findall(r'^\| [a-z`].* \| .* \|$', found, re.MULTILINE)) == 6


def test_the_rows_are_medians_of_the_rounds(capsys, monkeypatch, tmp_path):
  """Programs that copy, and tell of what they did."""
  answer = {'read': [0, 0], 'write': [2, 1], 'check': [1, 1], 'moved': [4, 1], 'anonymous_bytes': 10**6}
  copy = ['sh', '-c', f"cp -r $0 $1 && echo '{json.dumps(answer)}'"]
  monkeypatch.setattr(
    export,
    'commands',
    lambda source, out: dict.fromkeys(('copy', 'ours', 'transformers'), [*copy, source, out]),
  )
  command = ['export.py', '--shape=toy', '--layers=1', '--rounds=2', f'--directory={tmp_path}']
  monkeypatch.setattr(sys, 'argv', command)
  export.main()
  told = capsys.readouterr()
  assert 'ours: read and write, sync | 2.00 (2.00–2.00) |' in told.out
  assert told.err.count('round 2/2') == 3 and not list(tmp_path.iterdir())
