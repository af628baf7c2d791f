"""Every error that a user can make: one line that names field, value and remedy, before heavy work."""

import json
import pathlib
import re
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from adapt_jax.config.build import from_dict
from adapt_jax.models.errors import InputError
from adapt_jax.models.formats.source import open_source
from adapt_jax.modes import sensitivity
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.workdir import Workdir
from tests.support import runs


def refuse(config, *words):
  """Preparing the run raises one line that has all the words; returns it."""
  with pytest.raises(InputError) as error:
    prepare(from_dict(config.to_dict()))
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message, f'{word!r} not in {message!r}'
  return message


FIELDS = [
  ('prune.stages', 0),
  ('prune.steps', 0),
  ('prune.amplitude', -0.1),
  ('prune.target', 0.0),
  ('prune.target', -0.5),
  ('prune.target', float('nan')),
  ('prune.target', float('inf')),
  ('prune.align_ffn', 0),
  ('prune.method', 'sparsegpt'),
  ('prune.importance', 'tailor'),
  ('prune.layer_distance', 'cosinus'),
  ('prune.stage_targets', 'log'),
  ('prune.calibration.samples', 0),
  ('prune.calibration.batch', 0),
  ('prune.serve', 'llama.cpp'),
  ('prune.serve', 'tensor_parallel=0'),
  ('data.chat_template', 'plane'),
  ('train.weights', (1.0, 2.0)),
  ('prune.calibration.weights', (1.0, 2.0)),
  ('prune.calibration.weights', (-1.0,)),
  ('train.weights', (-1.0,)),
  ('train.weights', (0.0,)),
  ('train.weights', (float('nan'),)),
  ('train.layout', 'stacked'),
  ('train.micro_batch', 0),
  ('mesh.fsdp', 0),
  ('mesh.tensor', -2),
  ('mesh.data', -1),
  ('train.schedule', 'linear'),
  ('train.mu_dtype', 'int8'),
  ('train.lr', -2.0),
  ('train.lr', float('nan')),
  ('train.min_lr', 0.5),
  ('train.clip', 0.0),
  ('train.tokens', 5),
  ('train.distill.alpha', 1.5),
  ('model.dtype', 'float8'),
  ('export.dtype', 'int8'),
  ('generate.max_new_tokens', 0),
  ('generate.temperature', -1.0),
  ('bench.new_tokens', 1),
  ('seed', -1),
]


@pytest.mark.parametrize('field,value', FIELDS, ids=lambda x: str(x))
def test_values_out_of_range(files, field, value):
  config = runs.make_config(files)
  config.update_from_flattened_dict({field: value})
  refuse(config, f'{field}', str(value))


def test_unknown_field(files):
  values = runs.make_config(files).to_dict()
  values['prune']['targt'] = 0.5
  with pytest.raises(InputError, match=r'prune\.targt is unknown: did you mean target\?$'):
    from_dict(values)
  del values['prune']['targt']
  values['prune']['quantise'] = True
  with pytest.raises(InputError, match=r'prune\.quantise is unknown; options here: method, compensate'):
    from_dict(values)


@pytest.mark.parametrize('value', ['much', None, [1], True])
def test_wrong_types(files, value):
  values = runs.make_config(files).to_dict()
  values['train']['lr'] = value
  with pytest.raises(InputError, match=r'train\.lr = .* must be of type float'):
    from_dict(values)


def test_target_above_and_below_what_can_be_reached(files):
  config = runs.make_config(files)
  config.prune.target = 1e9
  refuse(config, 'prune.target', '1,000,000,000', 'lower it')
  config.prune.target = 0.05
  refuse(config, 'prune.target', '0.05', 'raise it')


def test_budgets_name_what_they_need_and_their_smallest_target(files):
  config = runs.make_config(files)
  config.prune.budget = 'latency'
  refuse(config, "prune.budget = 'latency'", 'prune.latency_table', '--mode=bench')
  config.prune.latency_table = str(files / 'absent.json')
  refuse(config, 'prune.latency_table', 'absent.json')
  config.prune.latency_table = str(files / 'model/config.json')
  refuse(config, 'prune.latency_table', 'config.json', 'holds no table', 'h100')
  config.prune.budget = 'kv_cache'
  refuse(config, 'prune.latency_table', 'config.json', "not with 'kv_cache'", 'leave the table empty')
  config.prune.latency_table, config.prune.target = '', 0.2  # of 768 bytes; each layer keeps 64
  refuse(config, 'prune.target = 0.2', '153 bytes', 'always keeps 256 bytes of KV cache', 'raise it')
  config.prune.target = 1000
  refuse(config, 'prune.target = 1,000', '768 bytes', 'lower it')


def test_methods_that_do_not_go_with_the_rest(files):
  config = runs.make_config(files)
  config.prune.method = 'llm_pruner'  # the model has four layers
  refuse(config, 'prune.method', 'llm_pruner', 'only 4', 'another method')
  config.prune.method, config.prune.target = 'shortgpt', 0.3
  refuse(config, 'prune.target = 0.3', 'ShortGpt', 'raise it')


def test_what_slicegpt_cannot_do(files, tmp_path):
  config = runs.make_config(files)
  config.prune.method, config.prune.compensate = 'slicegpt', 'none'
  config.prune.budget = 'flops'
  refuse(config, "prune.budget = 'flops'", 'slicegpt', "set it to 'params'")
  config.prune.budget = 'params'
  refuse(config, 'prune.stages = 2', 'slicegpt', 'set it to 1')
  config.prune.stages = 1
  refuse(config, 'train.tokens', 'slicegpt', '--mode=prune')
  config.train.tokens = 0
  config.export.formats = ('hf', 'gguf')
  refuse(config, 'export.formats', 'gguf', 'slicegpt')
  with pytest.raises(InputError, match='scores no groups'):
    sensitivity.run(from_dict(config.to_dict()), Workdir(str(tmp_path), {}), '')
  config.export.formats, config.prune.target = ('hf',), 2
  refuse(config, 'prune.target = 2', 'raise it')


@pytest.mark.parametrize('field', ['prune.calibration.source', 'train.source', 'evaluate.source'])
def test_missing_files_and_directories(files, field):
  config = runs.make_config(files)
  config.update_from_flattened_dict({field: (str(files / 'absent.txt'),)})
  refuse(config, f'{field}', 'absent.txt')


def test_text_field_that_is_not_there(files):
  (files / 'rows.jsonl').write_text(json.dumps({'body': 'x'}) + '\n')
  config = runs.make_config(files)
  config.train.source = (str(files / 'rows.jsonl'),)
  refuse(config, 'rows.jsonl', "'text'", "'body'")


def test_sequence_longer_than_the_data(files):
  (files / 'short.txt').write_text('few words')
  config = runs.make_config(files)
  config.evaluate.source = (str(files / 'short.txt'),)
  config.evaluate.length = 4096
  refuse(config, 'evaluate.source', '4096')
  config = runs.make_config(files)
  config.prune.calibration.source = (str(files / 'valid.txt'),)
  config.prune.calibration.samples = 8192
  refuse(config, 'prune.calibration.samples', '8192')


def test_token_ids_beyond_the_embedding(files):
  np.save(files / 'ids.npy', np.full((16, 16), 99_999, np.int32))
  config = runs.make_config(files)
  config.prune.calibration.source = (str(files / 'ids.npy'),)
  refuse(config, 'prune.calibration.source', '99999', 'embedding')


def broken_model(files, name):
  path = files / name
  shutil.copytree(files / 'model', path)
  return path


def refuse_model(files, path, *words):
  config = runs.make_config(files)
  config.model.source = str(path)
  refuse(config, *words)


def test_no_such_model(files):
  refuse_model(files, '', 'model.source')
  refuse_model(files, files / 'nowhere', 'model.source', 'nowhere')


def test_tokenizer_of_another_model(files):
  path = broken_model(files, 'tokenizer')
  tensors = load_file(path / 'model.safetensors')
  tensors['model.embed_tokens.weight'] = tensors['model.embed_tokens.weight'][:100]
  save_file(tensors, path / 'model.safetensors')
  config = json.loads((path / 'config.json').read_text()) | {'vocab_size': 100}
  (path / 'config.json').write_text(json.dumps(config))
  refuse_model(files, path, 'tokenizer', '100')


def test_truncated_weights(files):
  path = broken_model(files, 'truncated')
  weights = path / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-100])
  refuse_model(files, path, 'model.safetensors', 'truncated')


def test_checkpoint_that_wants_its_code_run(files):
  path = broken_model(files, 'code')
  config = json.loads((path / 'config.json').read_text())
  config |= {'model_type': 'brandnew', 'auto_map': {'AutoConfig': 'x.Config'}}
  (path / 'config.json').write_text(json.dumps(config))
  (path / 'x.py').write_text("raise SystemExit('ran')")
  refuse_model(files, path, 'brandnew', 'never run')


def test_tokenizer_that_wants_its_code_run(files):
  path = broken_model(files, 'tokenizer_code')
  for name in ('tokenizer.json',):
    (path / name).unlink()
  config = {'auto_map': {'AutoTokenizer': ['x.Tokenizer', None]}, 'tokenizer_class': 'BrandNewTokenizer'}
  (path / 'tokenizer_config.json').write_text(json.dumps(config))
  (path / 'x.py').write_text("raise SystemExit('ran')")
  refuse_model(files, path, 'tokenizer')


def test_workdirs(files, tmp_path):
  with pytest.raises(InputError, match='--workdir is empty'):
    Workdir('', {})
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='is a file or a broken link'):
    Workdir(str(tmp_path / 'file'), {}).check()
  with pytest.raises(InputError, match='contains other files'):
    Workdir(str(tmp_path), {}).check()
  Workdir(str(tmp_path / 'new'), {}).check()
  assert not (tmp_path / 'new').exists()


@pytest.mark.skipif(
  not pathlib.Path('/proc/self').exists(), reason='needs a file system that root cannot write'
)
def test_workdir_that_cannot_be_written():
  with pytest.raises(InputError, match='not writable'):
    Workdir('/proc/self/out', {}).check()


def test_chats_without_an_assistant(files):
  row = {'messages': [{'role': 'user', 'content': 'hello there ' * 30}]}
  (files / 'chats.jsonl').write_text((json.dumps(row) + '\n') * 5)
  config = runs.make_config(files)
  config.train.source = (str(files / 'chats.jsonl'),)
  refuse(config, 'train.source', 'no token to predict')


def test_a_file_without_rows(files):
  np.save(files / 'empty.npy', np.zeros((0, 32), np.int32))
  config = runs.make_config(files)
  config.train.source = (str(files / 'empty.npy'),)
  refuse(config, 'train.source', 'it has no rows')


@pytest.mark.parametrize('stages', [1, 2, 20, 101])
def test_a_stage_without_a_training_step(files, stages):
  """The remedy is the smallest number that is enough."""
  config = runs.make_config(files)
  config.prune.stages, config.train.tokens = stages, 127
  message = refuse(config, 'train.tokens', f'{stages} stages')
  least = int(re.search(r'give at least ([\d,]+)', message)[1].replace(',', ''))
  config.train.tokens = least - 1
  refuse(config, 'train.tokens', f'give at least {least:,}')
  config.train.tokens = least
  prepare(from_dict(config.to_dict()))


def test_a_damaged_lineage(files, tmp_path):
  """It is read for the card, which is written at the end."""
  shutil.copytree(files / 'model', tmp_path / 'model')
  (tmp_path / 'model/lineage.json').write_text('{"model": {"source": "org/Base"}, "origin": {"a": 1}}')
  refuse_model(files, tmp_path / 'model', 'lineage.json', 'delete it')


def test_workdir_of_a_run_that_was_killed_while_claiming(tmp_path):
  (tmp_path / '.run.json.tmp').write_text('{')
  Workdir(str(tmp_path), {}).check()


@pytest.mark.parametrize('content', ['{', '[1]', '\x00'])
def test_damaged_run_json(tmp_path, content):
  (tmp_path / 'run.json').write_text(content)
  with pytest.raises(InputError, match='run.json|belongs to a run'):
    Workdir(str(tmp_path), {'mode': 'accel'}).check()


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch):
  """Its cache is still looked at; a mistyped local path is reported at once."""

  def unknown(*_):
    raise OSError('no such name')

  monkeypatch.setattr('urllib.request.getproxies', dict)
  monkeypatch.setattr('socket.getaddrinfo', unknown)
  start = time.monotonic()
  with pytest.raises(InputError, match="'models/mine': no such directory"):
    open_source('models/mine')
  assert time.monotonic() - start < 5


def test_an_export_into_the_runs_own_workdir_names_the_command(files, tmp_path):
  config = runs.make_config(files)
  options = from_dict(config.to_dict())
  with Workdir(str(tmp_path / 'out'), MODES['prune'].identity(options)).claimed():
    pass
  with pytest.raises(InputError, match='--workdir=.*out-export and --config.model.source='):
    Workdir(str(tmp_path / 'out'), MODES['export'].identity(options)).check()


def test_too_few_tokens_says_how_many_are_enough(files):
  config = runs.make_config(files)
  config.prune.stages, config.train.tokens = 5, 4 * 32 * 5
  with pytest.raises(InputError, match='give at least 1,024') as error:
    prepare(from_dict(config.to_dict()))
  least = int(str(error.value).split('at least ')[1].split(',  ')[0].split(', or')[0].replace(',', ''))
  config.train.tokens = least
  prepare(from_dict(config.to_dict()))
  config.train.tokens = least - 4 * 32
  refuse(config, 'train.tokens')
