"""Files of others that are no files, or hold what no program writes: one line at once, without waiting."""

import faulthandler
import os
import pathlib
import shutil
import signal
import socket
import struct

import pyarrow
import pytest
from pyarrow import parquet

from adapt_jax.config.build import from_dict
from adapt_jax.data.documents import check_source, read_documents
from adapt_jax.data.token_cache import token_directory
from adapt_jax.evaluation.harness import _manager
from adapt_jax.export.writer import lineage
from adapt_jax.models.formats.source import open_config, open_source
from adapt_jax.pipeline.inputs import prepare
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.state import StateStore
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports.report import read_report
from adapt_jax.training.teacher_cache import _done
from tests.support import runs
from tests.support.helpers import refused, tiny_config

SECONDS = 20  # that a test may take: it would otherwise wait for ever
FIELDS = {'text_field': 'text', 'messages_field': 'messages'}
DEEP = '[' * 100_000 + ']' * 100_000


@pytest.fixture(autouse=True)
def no_waiting():
  def stop(*_):
    raise TimeoutError(f'waited for {SECONDS} s')

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  faulthandler.dump_traceback_later(2 * SECONDS, exit=True)  # in a library that goes on waiting
  yield
  faulthandler.cancel_dump_traceback_later()
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


@pytest.fixture
def model(files, tmp_path):
  shutil.copytree(files / 'model', tmp_path / 'model')
  return tmp_path / 'model'


def pipe(path: pathlib.Path) -> str:
  os.mkfifo(path)
  return 'named pipe'


def device(path: pathlib.Path) -> str:
  path.symlink_to('/dev/null')  # refused as /dev/zero is, which would fill the memory if it were not
  return 'device'


def directory(path: pathlib.Path) -> str:
  path.mkdir()
  return 'directory'


def unix_socket(path: pathlib.Path) -> str:
  here = os.getcwd()
  os.chdir(path.parent)  # the name of a socket has at most 107 bytes
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(path.name)
  os.chdir(here)
  return 'socket'


KINDS = (pipe, device, directory, unix_socket)


def replaced(path: pathlib.Path, make) -> str:
  path.unlink(missing_ok=True)
  return make(path)


@pytest.mark.parametrize('make', KINDS)
@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.json', 'a.parquet', 'a.npy'])
def test_a_text_that_is_no_file(tmp_path, name, make):
  kind = make(tmp_path / name)
  if make is directory and name != 'a.npy':
    return  # a directory of texts
  message = refused(check_source, (str(tmp_path / name),), 'train.source', **FIELDS)
  assert f'{name} is a {kind}, not a file' in message


@pytest.mark.parametrize('make', (pipe, device))
@pytest.mark.parametrize(
  'name',
  [
    'config.json', 'generation_config.json', 'model.safetensors', 'model.safetensors.index.json',
    'tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja',
  ],
)  # fmt: skip
def test_a_part_of_a_model_that_is_no_file(model, name, make):
  kind = replaced(model / name, make)
  assert f'{name} is a {kind}' in refused(lambda: open_source(str(model)).load_tokenizer())


@pytest.mark.parametrize('make', KINDS)
def test_a_gguf_file_that_is_no_file(tmp_path, make):
  kind = make(tmp_path / 'model.gguf')
  for read in (open_source, open_config):
    assert f'model.gguf is a {kind}' in refused(read, str(tmp_path / 'model.gguf'))


@pytest.mark.parametrize('make', KINDS)
def test_a_chat_template_that_is_no_file(files, tmp_path, make):
  kind = make(tmp_path / 'chat.jinja')
  config = runs.make_config(files)
  config.data.chat_template = str(tmp_path / 'chat.jinja')
  message = refused(prepare, from_dict(config.to_dict()))
  assert 'data.chat_template' in message and f'is a {kind}' in message


@pytest.mark.parametrize('make', KINDS)
@pytest.mark.parametrize(
  'name,read',
  [
    ('run.json', lambda path: Workdir(str(path), {'mode': 'accel'}).check()),
    ('metrics.jsonl', lambda path: MetricsLog(path / 'metrics.jsonl')),
    ('report.json', lambda path: read_report(path / 'report.json')),
    ('done', _done),
    ('tasks.yaml', lambda path: _manager(str(path))),
  ],
)
def test_a_file_of_a_workdir_that_is_no_file(tmp_path, name, read, make):
  kind = make(tmp_path / name)
  assert f'{name} is a {kind}' in refused(read, tmp_path)


@pytest.mark.parametrize('make', (pipe, device))
def test_a_lineage_that_is_no_file(model, make):
  kind = make(model / 'lineage.json')
  assert f'lineage.json is a {kind}' in refused(lineage, open_source(str(model)))


@pytest.mark.parametrize('make', (pipe, device, directory))
def test_a_token_cache_whose_parts_are_no_files_is_made_again(files, tmp_path, make):
  config = runs.make_config(files)
  config.data.cache = str(tmp_path / 'cache')
  first = prepare(from_dict(config.to_dict())).digests()
  for path in (tmp_path / 'cache').glob('*/meta.json'):
    replaced(path, make)
  assert prepare(from_dict(config.to_dict())).digests() == first
  assert all(path.is_file() for path in (tmp_path / 'cache').glob('*/meta.json'))


@pytest.mark.parametrize('name', ['a.jsonl', 'a.json'])
def test_a_text_nested_deeply(tmp_path, name):
  (tmp_path / name).write_text(DEEP if name == 'a.json' else '{"text": ' + DEEP + '}')
  assert 'not valid JSON' in refused(check_source, (str(tmp_path / name),), 'train.source', **FIELDS)


@pytest.mark.parametrize(
  'name',
  [
    'config.json', 'generation_config.json', 'model.safetensors.index.json', 'tokenizer.json',
    'tokenizer_config.json', 'lineage.json',
  ],
)  # fmt: skip
def test_a_part_of_a_model_nested_deeply(model, name):
  (model / name).write_text('{"a": ' + DEEP + '}')

  def read():
    source = open_source(str(model))
    source.load_tokenizer()
    lineage(source)

  message = refused(read)
  assert str(model) in message and ('JSON' in message or 'tokenizer' in message)


@pytest.mark.parametrize('place', ['top', 'field'])
def test_a_safetensors_header_nested_deeply(model, place):
  """The library skips fields that it does not know, at any depth."""
  tensor = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": ' + DEEP + '}'
  header = (f'{{"a": {tensor}}}' if place == 'field' else f'{{"__metadata__": {DEEP}}}').encode()
  (model / 'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header + b'\0' * 4)
  assert 'corrupt or truncated safetensors' in refused(open_source, str(model))


@pytest.mark.parametrize(
  'name,read',
  [
    ('run.json', lambda path: Workdir(str(path), {'mode': 'accel'}).check()),
    ('metrics.jsonl', lambda path: MetricsLog(path / 'metrics.jsonl')),
    ('report.json', lambda path: read_report(path / 'report.json')),
  ],
)
def test_a_file_of_a_workdir_nested_deeply(tmp_path, name, read):
  (tmp_path / name).write_text('{"event": ' + DEEP + '}\n')
  assert str(tmp_path) in refused(read, tmp_path)


def test_a_plan_nested_deeply(tmp_path):
  store = StateStore(Workdir(str(tmp_path), {}), tiny_config(), MetricsLog(tmp_path / 'metrics.jsonl'))
  (tmp_path / 'plan.json').write_text('{"stage": ' + DEEP + '}')
  message = refused(store.resume, None, dict)
  assert 'plan.json' in message and 'delete it' in message
  store.close()


def test_a_log_with_one_bad_byte(tmp_path):
  path, good = (
    tmp_path / 'metrics.jsonl',
    b'{"event": "evaluate", "of": "dense", "step": 0, "perplexity": 2.5}\n',
  )
  for bad in (b'{"event": "pru\xffne"}', b'{"event": ', b'[1]', b'7', b'{"step": 1}', b'\0'):
    path.write_bytes(good + bad + b'\n' + good)
    assert f'{path}: line 2 is damaged: repair it' in refused(MetricsLog, path)
  path.write_bytes(good + b'{"event": "tr\xff')  # the end of a line that a crash cut
  assert MetricsLog(path).lines == 1 and path.read_bytes() == good


@pytest.mark.parametrize(
  'header',
  [
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (4, 4), }",  # not that much data
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (99999999999999999999, 4), }",
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (-1, 4), }",
    b"{'descr': ('<i4', 3, 4, 5), 'fortran_order': False, 'shape': (1, 1), }",
    b"{'descr': '<i4', 'shape': (",
    b"{'a': 'b\n  c\n d",
    b"'" + b'(' * 3000,
    b'(' * 3000 + b')' * 3000,
    b'-' * 9000 + b'1',
    b'\xff' * 40,
    b'',
  ],
  ids=range(11),
)
def test_a_damaged_npy_header(tmp_path, header):
  path = tmp_path / 'a.npy'
  path.write_bytes(b'\x93NUMPY\1\0' + struct.pack('<H', len(header) + 1) + header + b'\n' + b'\0' * 4)
  message = refused(check_source, (str(path),), 'train.source', **FIELDS)
  assert 'train.source' in message and 'not a readable .npy file' in message


@pytest.mark.parametrize('unit', ['ms', 'us'])
def test_parquet_times_that_no_calendar_has(tmp_path, unit):
  times = pyarrow.array([2**60], pyarrow.int64()).cast(pyarrow.timestamp(unit))
  parquet.write_table(pyarrow.table({'text': times}), tmp_path / 'a.parquet')
  message = refused(check_source, (str(tmp_path / 'a.parquet'),), 'train.source', **FIELDS)
  assert 'a.parquet' in message


def test_a_user_who_does_not_exist(files):
  place = '~nobody-of-that-name/x'
  config = runs.make_config(files)
  for field in ('model.source', 'data.cache', 'data.chat_template', 'train.source'):
    config.update_from_flattened_dict({field: (place + '.txt',) if field == 'train.source' else place})
    assert place in refused(prepare, from_dict(config.to_dict())), field
    config = runs.make_config(files)
  config.data.cache = place
  refused(token_directory, from_dict(config.to_dict()).data)
  refused(open_config, place)
  refused(_manager, place)
  refused(check_source, (place + '.npy',), 'train.source', **FIELDS)


@pytest.mark.parametrize('name', ['a.txt', 'a.npy', 'org/set'])
def test_links_to_nothing_and_to_themselves(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.symlink_to('nothing')
  assert name in refused(check_source, (name,), 'train.source', **FIELDS)
  path.unlink()
  path.symlink_to(path.name)
  assert name in refused(check_source, (name,), 'train.source', **FIELDS)
  assert name in refused(open_source, name)


def test_a_glob_with_a_dangling_link(tmp_path):
  (tmp_path / 'a.txt').write_text('text')
  (tmp_path / 'b.txt').symlink_to('nothing')
  message = refused(check_source, (str(tmp_path / '*.txt'),), 'train.source', **FIELDS)
  assert 'b.txt' in message and 'link' in message


def test_globs_below_directories_match_as_in_a_shell(tmp_path, monkeypatch):
  for name in ('a/b/1.txt', 'a/.hidden/2.txt', 'a/x3.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  (tmp_path / 'work').mkdir()
  monkeypatch.chdir(tmp_path / 'work')
  for source, count in (('../**/*.txt', 2), ('../a/**/x**.txt', 1), ('../a/.hidden/**/*.txt', 1)):
    assert len(list(read_documents((source,), 'train.source', **FIELDS))) == count


def test_a_glob_does_not_follow_links_in_circles(tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in/a.txt').write_text('text')
  for name in ('x', 'y', 'in/z'):
    (tmp_path / name).symlink_to(tmp_path)
  for source in (str(tmp_path), str(tmp_path / '**/*.txt'), str(tmp_path / '**')):
    assert len(list(read_documents((source,), 'train.source', **FIELDS))) == 1


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_links_in_a_model_that_lead_nowhere(model, name):
  for target in ('nothing', name):
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    assert str(model) in refused(lambda: open_source(str(model)).load_tokenizer())


def test_links_of_the_hubs_cache_are_files(model, tmp_path):
  """There every file is a link to a blob."""
  (tmp_path / 'blobs').mkdir()
  for path in list(model.iterdir()):
    path.rename(tmp_path / 'blobs' / path.name)
    path.symlink_to(pathlib.Path('../blobs', path.name))
  open_source(str(model)).load_tokenizer()
