"""What a user can give that cannot work: one line that names the field and the value, before heavy work."""

import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.machine import memory
from adapt_jax.models.config import count_params
from adapt_jax.models.formats.source import open_source
from adapt_jax.pipeline.checks import check_teacher
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.schedule import target_cost
from adapt_jax.pruning import budget as budgets
from tests.support import runs
from tests.support.helpers import refused, tiny_config


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
  """Texts of which no rows can be made."""
  place = tmp_path_factory.mktemp('odd')
  (place / 'short.txt').write_text('few words')
  np.save(place / 'ids.npy', np.full((16, 16), 99_999, np.int32))
  return place


def test_training_that_the_machine_has_no_memory_for(files, monkeypatch):
  """Weights, gradients and two moments in fp32, and in mode accel the teacher; the target's parameters."""
  config = runs.make_config(files)
  config.train.distill.alpha = 1.0
  model = open_source(config.model.source).config
  dense, kept = count_params(model), target_cost(budgets.params(model), config.prune.target)
  for fields, needed in (
    ({}, 16 * kept + 4 * dense),
    ({'train.moments_dtype': 'bfloat16', 'train.distill.cache': 8}, 12 * kept),
    ({'train.tokens': 0, 'prune.heal': 1}, 12 * kept),
  ):
    config.update_from_flattened_dict(fields)
    options = from_dict(config.to_dict())
    monkeypatch.setattr(memory, 'total', lambda needed=needed: needed // 2)
    monkeypatch.setattr(memory, 'swap', lambda needed=needed: needed - needed // 2)
    prepare(options)
    monkeypatch.setattr(memory, 'swap', lambda needed=needed: needed - needed // 2 - 1)
    assert f'training {kept:,} parameters' in refused(prepare, options)
  config.prune.heal = 0
  prepare(from_dict(config.to_dict()))


def refuse(files, fields, *words):
  """Preparing the run with these options raises one line that has all the words; returns it."""
  config = runs.make_config(files)
  config.update_from_flattened_dict(fields)
  message = refused(lambda: prepare(from_dict(config.to_dict())))
  for word in words:
    assert word in message, f'{word!r} not in {message!r}'
  return message


def test_an_unknown_field_is_told_with_the_one_that_was_meant():
  assert refused(from_dict, {'prune': {'targt': 0.5}}) == 'prune.targt is unknown: did you mean target?'


SLICED = {'prune.method': 'slicegpt', 'prune.compensate': 'none', 'prune.stages': 1, 'train.tokens': 0}
CASES = [
  ({'prune.target': 1e9}, 'prune.target', '1,000,000,000', 'ask for a smaller one'),
  ({'prune.target': 0.05}, 'prune.target', '0.05', 'ask for a larger one'),
  (
    {'prune.target': '0.8latency', 'prune.latency_table': 'absent.json'},
    'prune.latency_table',
    'absent.json',
  ),
  ({'prune.target': '0.2kv'}, 'prune.target = 0.2kv', 'bytes of KV cache', 'ask for a larger one'),
  ({'prune.method': 'llm_pruner'}, 'prune.method', 'llm_pruner', 'layers'),
  ({'prune.method': 'shortgpt', 'prune.target': 0.3}, 'prune.target = 0.3', 'ask for a larger one'),
  (SLICED | {'prune.target': '0.8flops'}, 'prune.target', 'slicegpt'),
  (SLICED | {'prune.stages': 2}, 'prune.stages = 2', 'slicegpt'),
  (SLICED | {'train.tokens': 4096}, 'train.tokens', 'slicegpt'),
  (SLICED | {'export.formats': ('hf', 'gguf')}, 'export.formats', 'gguf', 'slicegpt'),
  (SLICED | {'prune.target': 2}, 'prune.target = 2', 'ask for a larger one'),
  ({'train.source': ('absent.txt',)}, 'train.source', 'absent.txt'),
  ({'evaluate.source': ('absent.txt',)}, 'evaluate.source', 'absent.txt'),
  ({'evaluate.source': ('{odd}/short.txt',), 'evaluate.length': 4096}, 'evaluate.source', '4096'),
  ({'prune.calibration.source': ('{files}/valid.txt',), 'prune.calibration.samples': 8192}, '8192'),
  ({'prune.calibration.source': ('{odd}/ids.npy',)}, 'prune.calibration.source', '99999', 'embedding'),
  ({'model.source': ''}, 'model.source'),
  ({'model.source': '{files}/nowhere'}, 'model.source', 'nowhere'),
  ({'model.source': '{files}/valid.txt'}, 'model.source', 'valid.txt'),
  ({'model.source': '~nobody-of-that-name/x'}, '~nobody-of-that-name'),
  ({'train.source': ('~nobody-of-that-name/x.txt',)}, '~nobody-of-that-name'),
]


@pytest.mark.parametrize('fields, words', [(fields, words) for fields, *words in CASES], ids=str)
def test_what_cannot_work_is_refused_before_the_run(files, odd, fields, words):
  def filled(value):
    values = value if isinstance(value, tuple) else (value,)
    values = tuple(v.format(files=files, odd=odd) if isinstance(v, str) else v for v in values)
    return values if isinstance(value, tuple) else values[0]

  refuse(files, {field: filled(value) for field, value in fields.items()}, *words)


@pytest.mark.parametrize('stages', [2, 101])
def test_a_stage_without_a_training_step(files, stages):
  """The remedy is the smallest number that is enough."""
  fields = {'prune.stages': stages, 'train.tokens': 127}
  message = refuse(files, fields, 'train.tokens', f'{stages} stages')
  least = int(re.search(r'give at least ([\d,]+)', message)[1].replace(',', ''))
  refuse(files, fields | {'train.tokens': least - 1}, 'train.tokens', f'give at least {least:,}')
  config = runs.make_config(files)
  config.update_from_flattened_dict(fields | {'train.tokens': least})
  prepare(from_dict(config.to_dict()))


def test_a_damaged_lineage_stops_a_run_before_it_starts(files, tmp_path):
  """It is read for the card, which is written at the end."""
  shutil.copytree(files / 'model', tmp_path / 'model')
  (tmp_path / 'model/lineage.json').write_text('{"model": {"source": "org/Base"}, "origin": {"a": 1}}')
  refuse(files, {'model.source': str(tmp_path / 'model')}, 'lineage.json')


def test_a_teacher_of_other_tokens_is_refused():
  """Of a vocabulary as large; it may name rows that only fill the embedding."""

  def check(**theirs):
    teacher, ours = (SimpleNamespace(get_vocab=lambda ids=ids: ids) for ids in (theirs, {'a': 0, 'b': 1}))
    check_teacher('teacher', tiny_config(), teacher, tiny_config(), ours)

  check(a=0, b=1, filling=2)
  assert 'teacher' in refused(check, a=1, b=0)


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch):
  """Its cache is still looked at; a mistyped local path is reported at once."""

  def unknown(*_):
    raise OSError('no such name')

  monkeypatch.setattr('urllib.request.getproxies', dict)
  monkeypatch.setattr('socket.getaddrinfo', unknown)
  start = time.monotonic()
  assert "'models/mine': no such directory" in refused(open_source, 'models/mine')
  assert time.monotonic() - start < 5
