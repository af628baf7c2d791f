"""What others wrote must not break what we write; an output that closes or a workdir that denies writes."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest
from markdown_it import MarkdownIt

from adapt_jax import cli
from adapt_jax.data import token_cache
from adapt_jax.export.card import model_card
from adapt_jax.export.writer import lineage
from adapt_jax.machine import processes, progress
from adapt_jax.models.errors import write_denied
from adapt_jax.models.formats.source import open_source
from tests.support import runs
from tests.support.helpers import refused
from tests.unit.test_card import CONFIG, FILES, REPORT

NASTY = (
  '<script>alert(1)</script>',
  'x\n---\nlicense: mit\n---\n# Other',
  'a`b``c```d',
  '`',
  '[link](http://x.y) ![p](q) *b* _i_ ~~s~~ | c | &lt; $x$',
  'a\\',
  '- item\n\n    code',
  'x\x85y\u2028z\x0b\x0c',
  '1. one\n2. two',
  '```\n</pre>\n# head',
)


@pytest.fixture
def model(files, tmp_path):
  shutil.copytree(files / 'model', tmp_path / 'model')
  return tmp_path / 'model'


def structure(card: str) -> list[str]:
  """The kinds of blocks and of inline parts, without the texts in them."""
  tokens = MarkdownIt('gfm-like', {'linkify': False}).parse(card.split('---\n', 2)[2])
  found = []
  for token in tokens:
    found.append(token.type)
    found += [f' {child.type}' for child in token.children or () if child.type != 'text_special']
  return found


@pytest.mark.parametrize('text', NASTY)
@pytest.mark.parametrize('place', ['source', 'command', 'data', 'definition', 'task', 'setting', 'version'])
def test_a_card_has_the_same_parts_whatever_the_names_are(text, place):
  def report(value):
    found = json.loads(json.dumps(REPORT))
    if place == 'source':
      found['model'] |= {'source': value, 'hub': False}
    if place == 'command':
      found['command'] = value
    if place == 'data':
      found['data']['train'] = [value]
    if place == 'definition':
      found['perplexity']['definition'] = value
    if place == 'task':
      found['tasks'] = dict.fromkeys(('dense', 'recovered'), {value: {value: 0.5}})
    if place == 'setting':
      found['prune'] = {value: value}
    if place == 'version':
      found['versions'] = {value: value}
    return model_card(found, CONFIG, FILES)

  card, plain = report(text), report('name')
  fields, others = (huggingface_hub.ModelCard(x).data.to_dict() for x in (card, plain))
  (index,), (other,) = fields.pop('model-index'), others.pop('model-index')
  assert fields == others and len(index['results']) == len(other['results'])
  assert place != 'task' or index['results'][-1]['dataset'] == dict.fromkeys(
    ('name', 'type'), ' '.join(text.split())
  )
  assert structure(card) == structure(plain)
  if place == 'command':
    (block,) = (t for t in MarkdownIt().parse(card) if t.type == 'fence' and t.info == 'sh')
    assert block.content == text + '\n'


def test_ordinary_names_stay_as_they_are():
  for name in ('org/Base-1.5B', 'org/my_model_v2.1', 'Qwen2.5 (0.5B)'):
    report = REPORT | {'model': REPORT['model'] | {'source': name}}
    assert f'# {name}, pruned' in model_card(report, CONFIG, FILES)


@pytest.mark.parametrize(
  'change',
  [
    {'stages': [{}]},
    {'stages': [{'stage': 1}]},
    {'stages': 7},
    {'perplexity': {'dense': [1], 'definition': 3}, 'texts': {'a': 1, 'b': 2}},
    {'tasks': {'dense': 'x'}},
    {'data': {'train': 5}},
    {'origin': {'source': 'a', 'params': 'many'}},
    {'origin': {'sauce': 'a'}},
    {'versions': ['x']},
    {'command': 5},
    {'origin': {'source': '\ud800'}},
  ],
  ids=range(11),
)
def test_a_lineage_without_its_fields(model, change):
  files = {file.name: file.stat().st_size for file in model.glob('*.safetensors')}
  good = {'model': {'source': 'org/name'}, 'origin': {'source': 'org/name'}, 'files': files}
  (model / 'lineage.json').write_text(json.dumps(good))
  assert lineage(open_source(str(model)))['model']['source'] == 'org/name'
  (model / 'lineage.json').write_text(json.dumps(good | change))
  message = refused(lineage, open_source(str(model)))
  assert f'{model}/lineage.json' in message and 'delete it' in message


def test_a_damaged_lineage_stops_an_export_before_anything_is_written(files, model, tmp_path):
  (model / 'lineage.json').write_text(json.dumps({'origin': {'sauce': 'org/name'}}))
  done = runs.main(files, tmp_path / 'out', '--mode=export', f'--config.model.source={model}')
  assert done.returncode == 2 and 'Traceback' not in done.stderr and not (tmp_path / 'out').exists()
  assert done.stderr.splitlines()[-1].startswith('error: ') and str(model) in done.stderr


@pytest.mark.parametrize('name', ['generation_config.json', 'tokenizer_config.json'])
def test_half_a_character_that_an_export_would_write(model, name):
  fields = json.loads((model / name).read_text()) if (model / name).exists() else {}
  (model / name).write_text(json.dumps(fields | {'note': ['\ud800']}))
  message = refused(lambda: open_source(str(model)).load_tokenizer())
  assert str(model) in message and 'unpaired surrogate' in message


def closed(*_):
  raise BrokenPipeError(errno.EPIPE, 'Broken pipe')


def test_a_closed_pipe_is_no_cache_that_cannot_be_written(files, tmp_path, monkeypatch):
  """The first bar is shown while tokens are being cached."""
  options = {'text_field': 'text', 'messages_field': 'messages', 'field': 'train.source'}
  tokenizer = open_source(str(files / 'model')).load_tokenizer()
  monkeypatch.setattr(sys.stdout, 'write', closed)
  with pytest.raises(processes.OutputClosed):
    token_cache.open_cache(
      tmp_path / 'cache', str(files / 'train.txt'), tokenizer, token_cache.Need(99), **options
    )


def test_a_closed_pipe_ends_the_lines_of_silent_work(monkeypatch):
  """They are printed by a thread of their own, whose traceback would follow."""
  raised = []
  monkeypatch.setattr(threading, 'excepthook', raised.append)
  monkeypatch.setattr(progress, '_TICK_SECONDS', 0.01)
  monkeypatch.setattr(progress, '_LINE_SECONDS', 0.01)
  with progress.Progress('work', None), monkeypatch.context() as patch:
    patch.setattr(sys.stdout, 'write', closed)
    time.sleep(0.3)
  assert not raised


def test_help_into_a_closed_pipe(files):
  """As in `| head -1`: no traceback."""
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run(
    [sys.executable, 'main.py', '--help'], stdout=write, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT
  )
  os.close(write)
  assert done.returncode == 1 and done.stderr == ''


def test_a_name_that_is_not_utf_8_is_refused_before_the_run(files, tmp_path):
  """The command is quoted in the page, the report and the card."""
  done = runs.main(files, tmp_path / 'out\udcff')
  assert done.returncode == 2 and 'Traceback' not in done.stderr and not list(tmp_path.iterdir())
  assert done.stderr.splitlines()[-1].endswith('is not UTF-8, which reports cannot quote: rename the file')


@pytest.mark.parametrize('number', [errno.EROFS, errno.EACCES])
def test_a_workdir_that_becomes_read_only_during_the_run(monkeypatch, capsys, tmp_path, number):
  workdir = tmp_path / 'out'

  def start(*_, **__):
    try:
      raise PermissionError(number, os.strerror(number), str(workdir / '.report.html.tmp'))
    except OSError as error:
      raise RuntimeError('saving failed') from error

  monkeypatch.setattr(cli.app, 'run', start)
  monkeypatch.setattr(cli, '_WORKDIR', type('Flag', (), {'value': str(workdir), 'present': True}))
  with pytest.raises(SystemExit) as end:
    cli.run()
  assert end.value.code == 2
  assert capsys.readouterr().err == (
    f'error: --workdir={workdir}: {os.strerror(number)}: make it writable and run the same command again to '
    'resume\n'
  )
  monkeypatch.setattr(cli, '_WORKDIR', type('Flag', (), {'value': str(tmp_path / 'other'), 'present': True}))
  with pytest.raises(RuntimeError):  # not a file of the workdir: a fault of the program
    cli.run()


@pytest.mark.parametrize('directory,ours', [('out', True), ('./out', True), ('out/', True), ('other', False)])
def test_a_denied_write_belongs_to_the_workdir_however_it_is_written(directory, ours):
  denied = PermissionError(errno.EACCES, 'Permission denied', 'out/.report.html.tmp')
  assert bool(write_denied(denied, directory)) is ours
  assert not write_denied(PermissionError(errno.EACCES, 'Permission denied', 'texts/about/a.txt'), 'out')
