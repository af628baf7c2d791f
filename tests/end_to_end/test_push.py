"""Uploads to the hub, a stand-in of which runs here: refused early, complete at the end, repeated alone."""

import json
import os
import subprocess

import pytest

import adapt_jax as aj
from adapt_jax.config.build import from_dict
from adapt_jax.config.options import ExportOptions
from adapt_jax.export.push import check_token
from adapt_jax.export.push import push as upload
from adapt_jax.models.errors import InputError, Unreachable
from adapt_jax.modes import accel
from adapt_jax.modes import export as export_mode
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
  export_mode.run(from_dict(config.to_dict()), Workdir(str(tmp_path / 'out'), {}), 'the command')
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
    (stand_in.WRITES, 'others/small', 'rights to create'),
    (stand_in.WRITES, 'others/there', 'write access'),
  ],
)
def test_a_name_that_may_not_be_written_is_refused_before_the_run_starts(
  files, hub, tmp_path, monkeypatch, token, push, reason
):
  hub.repos |= {'org/there': {}, 'others/there': {}}
  monkeypatch.setenv('HF_TOKEN', token)
  monkeypatch.setattr(accel, 'run_class', None)
  options, workdir = pruning(files, tmp_path / 'out', push=push)
  message = refused(accel.run, options, workdir, 'the command')
  assert f'export.push = {push!r}' in message and reason in message and 'HF_TOKEN' in message
  assert not workdir.path.exists()
  with pytest.raises(InputError, match=f"^push = '{push}': {push} cannot be written"):
    aj.save(aj.load(files / 'model'), tmp_path / 'out', push=push)


def test_a_hub_that_is_away_is_told_from_a_refusal(tmp_path, monkeypatch):
  with stand_in.hub() as server:
    stand_in.use(server, monkeypatch)
  with pytest.raises(Unreachable, match="'org/small': org/small cannot be written .*Connection refused"):
    check_token(ExportOptions(push='org/small'))
  (tmp_path / 'hf').mkdir()
  with pytest.raises(Unreachable, match='the exports are complete: run the same command again'):
    upload(ExportOptions(push='org/small'), tmp_path)


def test_without_a_token_nothing_starts(files, hub, tmp_path, monkeypatch):
  monkeypatch.delenv('HF_TOKEN')
  monkeypatch.setattr('huggingface_hub.constants.HF_TOKEN_PATH', str(tmp_path / 'none'))
  options, workdir = pruning(files, tmp_path / 'out')
  message = refused(accel.run, options, workdir, 'the command')
  assert 'no token' in message and '`hf auth login`' in message and not hub.repos


def test_a_run_that_is_refused_creates_no_repository(files, hub, tmp_path):
  config = runs.make_config(files)
  config.export.push, config.prune.calibration.samples = 'org/small', 10**6
  options = from_dict(config.to_dict())
  workdir = Workdir(str(tmp_path / 'out'), MODES['accel'].identity(options))
  assert 'calibration.samples' in refused(accel.run, options, workdir, 'the command') and not hub.repos


@pytest.mark.parametrize('push', ['name', 'a/b/c', 'org/', 'org/näme', 'https://hub/org/name'])
def test_a_name_is_of_an_owner_and_a_repository(files, tmp_path, push):
  assert 'export.push' in refused(pruning, files, tmp_path, push=push)


def test_a_name_that_the_hub_forbids_is_refused(files, hub, tmp_path):
  options, workdir = pruning(files, tmp_path / 'out', push='org/a--b')
  assert 'a--b' in refused(accel.run, options, workdir, 'the command')


def test_a_failed_upload_keeps_the_exports_and_is_repeated_alone(files, hub, tmp_path, monkeypatch):
  options, workdir = pruning(files, tmp_path / 'out')
  hub.broken = True
  message = refused(accel.run, options, workdir, 'the command')
  assert message.startswith("export.push = 'org/small'") and 'the storage is down' in message
  assert 'the exports are complete' in message
  assert message.endswith('run the same command again, which only uploads') and not hub.repos['org/small']
  with monkeypatch.context() as patch:  # the token has expired meanwhile
    patch.setenv('HF_TOKEN', 'hf_expired')
    late = refused(upload, options.export, workdir.path)
  assert 'cannot be written' in late and late.endswith('run the same command again, which only uploads')
  written, report = content(workdir.hf), workdir.report.read_text()
  assert json.loads(report)['exports']['hf']
  flags = ['--mode=prune', '--config.evaluate.source=', '--config.export.push=org/small']
  flags += [f'--config.prune.{x}' for x in ('method=wanda_sp', 'compensate=none', 'stages=1')]
  command = runs.command(files, workdir.path, *flags)

  def again():
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | stand_in.environment(hub))

  failed = again()
  last = failed.stderr.splitlines()[-1]
  assert failed.returncode == 2 and last.startswith('error: export.push') and 'storage' in last
  hub.broken = False
  repeated = again()
  assert repeated.returncode == 0, repeated.stderr
  assert 'this run is finished' in repeated.stdout and 'uploaded to' in repeated.stdout
  assert hub.repos['org/small'] == written == content(workdir.hf) and workdir.report.read_text() == report
