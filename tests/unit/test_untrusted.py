"""Files of others and places that fail: one line, no other value, and nothing written elsewhere."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pyarrow
import pytest
from markdown_it import MarkdownIt
from pyarrow import parquet
from safetensors.numpy import save_file

from adapt_jax.data import token_cache
from adapt_jax.data.documents import check_source
from adapt_jax.export.card import model_card
from adapt_jax.export.hf import write_hf
from adapt_jax.generation.generator import check_prompts
from adapt_jax.machine import processes
from adapt_jax.models.errors import InputError, write_denied
from adapt_jax.models.files import new_directory, new_file, regular, write_text
from adapt_jax.models.formats.source import open_source
from tests.support import runs
from tests.support.helpers import UNIFORM, random_params, refused, tiny_config
from tests.support.tokenizers_for_tests import tiny_tokenizer
from tests.unit.test_card import CONFIG, FILES, REPORT

FIELDS = {'text_field': 'text', 'messages_field': 'messages'}


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  path, tokenizer = tmp_path_factory.mktemp('checkpoint') / 'model', tiny_tokenizer()
  config = tiny_config('llama', UNIFORM, vocab_size=len(tokenizer))
  write_hf(config, random_params(config), path, tokenizer=tokenizer)
  return path


@pytest.fixture
def model(checkpoint, tmp_path):
  shutil.copytree(checkpoint, tmp_path / 'model')
  return tmp_path / 'model'


def changed(path, change):
  fields = json.loads(path.read_text())
  change(fields)
  path.write_text(json.dumps(fields))


def test_what_is_no_file_is_not_waited_for(tmp_path):
  """Opening a named pipe waits for a writer, and a device has no end."""
  os.mkfifo(tmp_path / 'pipe')
  (tmp_path / 'device').symlink_to('/dev/zero')
  (tmp_path / 'directory').mkdir()
  for name in ('pipe', 'device', 'directory'):
    assert name in refused(regular, tmp_path / name)
  (tmp_path / 'link').symlink_to(__file__)
  regular(tmp_path / 'link')


@pytest.mark.parametrize('name', ['a\nb', '\x1b[2J', 'x' * 100_000])
def test_a_name_from_a_file_does_not_break_the_line(model, name):
  save_file({name: np.zeros(4, np.float32)}, model / 'model.safetensors')
  message = refused(open_source, str(model))
  assert message.isprintable() and str(model) in message and len(message) <= 2100
  assert str(InputError('a' * 5000 + ': lower it')).endswith(': lower it')


@pytest.mark.parametrize('name', ['config.json', 'tokenizer_config.json'])
def test_code_of_a_checkpoint_is_never_run(model, name):
  (model / 'x.py').write_text("raise SystemExit('ran')")
  kind = {'model_type': 'brandnew', 'auto_map': {'AutoConfig': 'x.Config'}}
  if name != 'config.json':
    kind = {'tokenizer_class': 'BrandNew', 'auto_map': {'AutoTokenizer': ['x.Tokenizer', None]}}
    (model / 'tokenizer.json').unlink()
  changed(model / name, lambda fields: fields.update(kind))
  refused(lambda: open_source(str(model)).load_tokenizer())


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors', 'tokenizer.json'])
def test_links_in_a_model_may_lead_to_blobs_but_not_nowhere(model, name):
  (model / 'blobs').mkdir()
  (model / name).rename(model / 'blobs' / name)
  (model / name).symlink_to(pathlib.Path('blobs', name))  # as in the hub's cache
  open_source(str(model)).load_tokenizer()
  for target in ('nothing', name):
    (model / name).unlink()
    (model / name).symlink_to(target)
    assert str(model) in refused(lambda: open_source(str(model)).load_tokenizer())


def test_a_tokenizer_with_ids_that_have_no_row(model):
  def post_process(fields):
    fields['post_processor']['processors'][1]['special_tokens']['<s>']['ids'] = [99_999]

  changed(model / 'tokenizer.json', post_process)
  assert 'ids up to 99999' in refused(open_source(str(model)).load_tokenizer)


def test_an_added_token_beyond_the_embedding_is_refused_only_in_a_text(model):
  """Gemma 3's text checkpoints have one, for images."""

  def add(fields):
    token = {'id': 99_999, 'content': '<image>', 'special': True}
    fields['added_tokens'].append({**fields['added_tokens'][0], **token})

  changed(model / 'tokenizer.json', add)
  source = open_source(str(model))
  tokenizer = source.load_tokenizer()
  check_prompts(source.config, [tokenizer('the')['input_ids']], 1)
  assert 'prompt 1' in refused(check_prompts, source.config, [tokenizer('a <image>')['input_ids']], 1)


TIMES = pyarrow.array([2**60], pyarrow.int64()).cast(pyarrow.timestamp('us'))


TEXTS = {
  'code.npy': lambda path: path.write_bytes(b'\x93NUMPY\1\0' + b'\x70\x17' + b'(' * 3000 + b')' * 3000),
  'times.parquet': lambda path: parquet.write_table(pyarrow.table({'text': TIMES}), path),
  'dangling.txt': lambda path: path.symlink_to('nothing'),
}


@pytest.mark.parametrize('name', TEXTS)
def test_a_text_that_cannot_be_read_is_named(tmp_path, name):
  TEXTS[name](tmp_path / name)
  assert name in refused(check_source, (str(tmp_path / name),), 'train.source', **FIELDS)


@pytest.mark.parametrize('writer', ['page', 'file', 'directory'])
@pytest.mark.parametrize('target', ['precious', '.', None])
def test_what_lies_under_a_temporary_name_is_removed_and_no_link_followed(tmp_path, writer, target):
  elsewhere, out = tmp_path / 'elsewhere', tmp_path / 'out'
  elsewhere.mkdir()
  out.mkdir()
  (elsewhere / 'precious').write_text('kept')
  if target is None:
    (out / '.x.tmp').mkdir()
  else:
    (out / '.x.tmp').symlink_to(elsewhere / target)
  if writer == 'page':
    write_text(out / 'x', 'page')
  else:
    with new_file(out / 'x') if writer == 'file' else new_directory(out / 'x') as new:
      (new if writer == 'file' else new / 'page').write_text('page')
  assert (out / 'x/page' if writer == 'directory' else out / 'x').read_text() == 'page'
  assert os.listdir(out) == ['x'] and os.listdir(elsewhere) == ['precious']
  assert (elsewhere / 'precious').read_text() == 'kept' and not (out / 'x').is_symlink()


NASTY = (
  '<script>alert(1)</script> [link](http://x.y) ![p](q) *b* _i_ ~~s~~ | c | &lt; $x$ a`b``c```d',
  'x\n---\nlicense: mit\n---\n# Other\n```\n</pre>\n# head',
  'a\\',
)


def structure(card: str) -> list[str]:
  """The kinds of blocks and of inline parts, without the texts in them."""
  tokens = MarkdownIt('gfm-like', {'linkify': False}).parse(card.split('---\n', 2)[2])
  inline = [child.type for token in tokens for child in token.children or () if child.type != 'text_special']
  return [token.type for token in tokens] + inline


@pytest.mark.parametrize('text', NASTY)
def test_a_card_has_the_same_parts_whatever_the_names_are(text):
  def card(value):
    report = json.loads(json.dumps(REPORT)) | {'command': value, 'versions': {value: value}}
    report['model'] |= {'source': value, 'hub': False}
    report['data']['train'] = [value]
    report['tasks'] = dict.fromkeys(('dense', 'recovered'), {value: {value: 0.5}})
    return model_card(report, CONFIG, FILES)

  fields, others = (huggingface_hub.ModelCard(card(x)).data.to_dict() for x in (text, 'name'))
  (index,), (other,) = fields.pop('model-index'), others.pop('model-index')
  assert fields == others and len(index['results']) == len(other['results'])
  assert structure(card(text)) == structure(card('name'))


def test_a_closed_pipe_is_no_cache_that_cannot_be_written(tmp_path, monkeypatch):
  """The first bar is shown while tokens are being cached."""

  def closed(*_):
    raise BrokenPipeError(errno.EPIPE, 'Broken pipe')

  (tmp_path / 'a.txt').write_text('the quick brown fox ' * 50)
  source, need = str(tmp_path / 'a.txt'), token_cache.Need(50)
  monkeypatch.setattr(sys.stdout, 'write', closed)
  with pytest.raises(processes.OutputClosed):
    token_cache.open_cache(tmp_path / 'c', source, tiny_tokenizer(), need, field='train.source', **FIELDS)


@pytest.mark.end_to_end
def test_help_into_a_closed_pipe():
  """As in `| head -1`: no traceback."""
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, 'main.py', '--help']
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT)
  os.close(write)
  assert done.returncode == 1 and done.stderr == ''


@pytest.mark.parametrize('directory,ours', [('out', True), ('./out/', True), ('other', False)])
def test_a_denied_write_belongs_to_the_workdir_however_it_is_written(directory, ours):
  denied = PermissionError(errno.EACCES, 'Permission denied', 'out/.report.html.tmp')
  assert bool(write_denied(denied, directory)) is ours
  assert not write_denied(PermissionError(errno.EACCES, 'Permission denied', 'texts/about/a.txt'), 'out')
