"""Uploads to the hub, a stand-in of which runs here: refused early, complete at the end, repeated alone."""

import dataclasses
import json

import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.config.options import ExportOptions
from adapt_jax.export.push import check_hub
from adapt_jax.export.push import push as upload
from adapt_jax.models.errors import InputError, Unreachable
from adapt_jax.modes import accel
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.workdir import Workdir
from tests.support import hub as stand_in
from tests.support import runs
from tests.support.helpers import refused


@pytest.fixture
def hub(monkeypatch):
  with stand_in.hub() as server:
    stand_in.use(server, monkeypatch)
    yield server


def pruning(files, path, **export):
  """Options and workdir of a run that only prunes, in one stage."""
  config = runs.make_config(files)
  config.prune.update({'method': 'wanda_sp', 'compensate': 'none', 'stages': 1})
  config.evaluate.source, config.train.tokens = (), 0
  config.export.update({'push': 'org/small'} | export)
  options = from_dict(config.to_dict())
  return options, Workdir(str(path), MODES['prune'].identity(options))


def content(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_format_arrives_byte_for_byte_in_its_repository(files, hub, tmp_path, capsys):
  config = runs.make_config(files)
  config.export.update({'push': 'org/small', 'formats': ('hf', 'hf_padded', 'gguf')})
  runs.in_process(config, tmp_path / 'out', 'export')
  names = {'hf': 'org/small', 'hf_padded': 'org/small-padded', 'gguf': 'org/small-GGUF'}
  assert hub.repos == {repo: content(tmp_path / 'out' / name) for name, repo in names.items()}
  assert {'model.safetensors', 'tokenizer.json', 'README.md'} <= hub.repos['org/small'].keys()
  out = capsys.readouterr().out
  for name, repo in names.items():
    assert f'uploading {tmp_path}/out/{name}, 0.' in out
    assert f'{tmp_path}/out/{name}: uploaded to {hub.url}/{repo}\n' in out
    card = (tmp_path / 'out' / name / 'README.md').read_text()
    assert repo in card and 'DIRECTORY' not in card


def test_an_upload_replaces_weights_and_code_and_keeps_other_files(files, hub, tmp_path):
  old = {'model-00001-of-00002.safetensors': b'old', 'modeling_adapt.py': b'old', 'LICENSE': b'theirs'}
  old |= {'tokenizer.model': b'old', 'vocab.json': b'old', 'chat_template.jinja': b'old'}
  hub.repos['org/small'] = old | {'README.md': b'old'}
  aj.save(aj.load(files / 'model'), tmp_path / 'out', push='org/small')
  assert hub.repos['org/small'] == content(tmp_path / 'out/hf') | {'LICENSE': b'theirs'}


@pytest.mark.parametrize(
  'token, push, reason',
  [
    ('hf_wrong', 'org/small', 'Invalid username or password'),
    (stand_in.READS, 'org/small', 'rights to create'),
    (stand_in.READS, 'org/there', 'write access'),
    (stand_in.WRITES, 'others/there', 'write access'),
    (stand_in.WRITES, 'org/a--b', 'a--b'),
    ('', 'org/small', '`hf auth login`'),
  ],
)
def test_a_name_that_may_not_be_written_is_refused(hub, tmp_path, monkeypatch, token, push, reason):
  hub.repos |= {'org/there': {}, 'others/there': {}}
  monkeypatch.setattr('huggingface_hub.constants.HF_TOKEN_PATH', str(tmp_path / 'none'))
  monkeypatch.setenv('HF_TOKEN', token)
  message = refused(check_hub, ExportOptions(push=push))
  assert f'export.push = {push!r}: {push} cannot be written' in message and reason in message
  assert 'HF_TOKEN' in message and set(hub.repos) == {'org/there', 'others/there'}


def test_a_hub_that_is_away_is_told_from_a_refusal(tmp_path, monkeypatch):
  with stand_in.hub() as server:
    stand_in.use(server, monkeypatch)
  with pytest.raises(Unreachable, match="'org/small': org/small cannot be written .*Connection refused"):
    check_hub(ExportOptions(push='org/small'))
  (tmp_path / 'hf').mkdir()
  with pytest.raises(Unreachable, match='the exports are complete: run the same command again'):
    upload(ExportOptions(push='org/small'), tmp_path)


def test_a_run_asks_the_hub_after_all_other_checks_and_before_it_starts(files, hub, tmp_path, monkeypatch):
  monkeypatch.setattr(accel, 'run_class', None)
  monkeypatch.setenv('HF_TOKEN', stand_in.READS)
  options, workdir = pruning(files, tmp_path / 'out')
  assert 'rights to create' in refused(accel.run, options, workdir, 'the command')
  assert not workdir.path.exists()
  with pytest.raises(InputError, match="^export.push = 'org/small': org/small cannot be written"):
    aj.save(aj.load(files / 'model'), tmp_path / 'out', push='org/small')
  calibration = dataclasses.replace(options.prune.calibration, samples=10**6)
  prune = dataclasses.replace(options.prune, calibration=calibration)
  message = refused(accel.run, dataclasses.replace(options, prune=prune), workdir, 'the command')
  assert 'calibration.samples' in message and not hub.repos
  assert 'export.push' in refused(pruning, files, tmp_path, push='name')


def test_a_failed_upload_keeps_the_exports_and_is_repeated_alone(files, hub, tmp_path):
  options, workdir = pruning(files, tmp_path / 'out')
  hub.broken = True
  message = refused(accel.run, options, workdir, 'the command')
  assert message.startswith("export.push = 'org/small'") and 'the storage is down' in message
  assert message.endswith('the exports are complete: run the same command again, which only uploads')
  written, report = content(workdir.hf), workdir.report.read_text()
  assert json.loads(report)['exports']['hf'] and not hub.repos['org/small']
  hub.broken = False
  upload(options.export, workdir.path)
  assert hub.repos['org/small'] == written == content(workdir.hf) and workdir.report.read_text() == report
