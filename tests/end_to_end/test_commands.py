"""The command line: exit codes, what it prints where, and the modes that need no workdir."""

import io
import os
import subprocess
import sys
import types

import pytest

from adapt_jax import cli
from adapt_jax.machine import targets
from adapt_jax.machine.targets import TARGETS
from adapt_jax.models.errors import InputError, Unreachable
from tests.support import forks, runs

WRONG = [
  ('--config.prune.targt=0.5', 'config.prune.target'),
  ('--target=0.5', 'config.prune.target'),
  ('prune', 'a mode is the first word'),
  ('--workdri=x', 'workdir'),
  ('--config.model=x', 'config.model'),
  ('--config.train.source=absent file.txt,b', 'absent file.txt'),
  ('--config.mesh.fsdp=3', 'fsdp = 3'),
  ('--config.mesh.platform=cuda', "mesh.platform = 'cuda', but JAX finds devices of cpu"),
  ('--workdir=gs://bucket/out', "'gs://bucket/out' is not a path"),
  ('--config.model.source=gs://bucket/model', "'gs://bucket/model' is not a path"),
  ('--config.train.source=s3://bucket/a.txt', "'s3://bucket/a.txt' is not a path"),
  ('--num_processes=2', '--coordinator_address'),
  ('--config=dmeo', 'demo'),
  ('--mode=walk', 'prune'),
  ('--mode=prun', 'did you mean prune?'),
  ('stray', 'stray'),
  ('--flagfile=absent.flags', 'absent.flags'),
]


@pytest.mark.parametrize('flag,named', WRONG)
def test_a_wrong_command_is_one_line_and_exit_code_2(files, tmp_path, flag, named):
  result = runs.main(files, tmp_path / 'out', flag)
  assert result.returncode == 2 and result.stderr.startswith('error: '), result.stderr
  assert named in result.stderr and len(result.stderr.splitlines()) == 1
  assert all(line.startswith('devices: ') for line in result.stdout.splitlines())
  assert not (tmp_path / 'out').exists()


RECIPES = [
  ('def get_config(:', 'SyntaxError'),
  ('def get_cfg(): pass', 'get_config'),
  ("def get_config(): raise ValueError('no such variant')", 'no such variant'),
  (
    'from adapt_jax.configs import base\ndef get_config():\n  c = base.get_config()\n'
    "  c.prune.target = '0.75x'\n  return c",
    'target',
  ),
]


@pytest.mark.parametrize('body,named', RECIPES)
def test_a_broken_recipe_is_one_line_and_exit_code_2(tmp_path, body, named):
  (tmp_path / 'recipe.py').write_text(body)
  result = runs.forks.main(['main.py', f'--config={tmp_path}/recipe.py', f'--workdir={tmp_path}/out'])
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and named in result.stderr


def test_a_platform_without_its_plug_in_is_one_line_and_exit_code_2(files, tmp_path, monkeypatch):
  command = runs.command(files, tmp_path / 'out', '--mode=prune')
  result = subprocess.run(
    command, env=os.environ | {'JAX_PLATFORMS': 'cuda'}, cwd=runs.ROOT, capture_output=True, text=True
  )
  assert result.returncode == 2 and 'adapt-jax[cuda]' in result.stderr
  assert len(result.stderr.splitlines()) == 1


def test_mode_estimate_needs_no_weights_texts_or_workdir(files, tmp_path):
  shapes = tmp_path / 'shapes'
  shapes.mkdir()
  (shapes / 'config.json').write_text((files / 'model/config.json').read_text())
  flags = [
    f'--config.model.source={shapes}',
    '--config.estimate.target=tpu-v6e',
    '--config.estimate.devices=2',
  ]
  result = runs.main(files, tmp_path / 'out', '--mode=estimate', *flags)
  assert result.returncode == 0, result.stderr
  assert 'GB of 32 GB per device: fits' in result.stdout
  assert ('adapt-jax[estimate]' in result.stdout) == bool(targets.missing(TARGETS['tpu-v6e']))
  assert not (tmp_path / 'out').exists()


def test_mode_generate_needs_no_workdir(files):
  flags = ['--mode=generate', '--config.generate.max_new_tokens=4']
  done = runs.main(files, '', *flags, '--prompt=the union', '--prompt=of, "need"')
  assert done.returncode == 0, done.stderr
  assert '== the union' in done.stdout and '== of, "need"' in done.stdout
  refused = runs.main(files, '', *flags)
  assert refused.returncode == 2 and '--prompt' in refused.stderr


def test_the_short_form_is_the_long_one(files):
  short = forks.main(
    ['main.py', 'generate', str(files / 'model'), '--max_new_tokens=4', '--prompt=the union']
  )
  flags = ['--mode=generate', '--config.generate.max_new_tokens=4', '--prompt=the union']
  assert short.returncode == 0, short.stderr
  said = [done.stdout.partition('== the union')[2] for done in (short, runs.main(files, '', *flags))]
  assert said[0] and said[0] == said[1]
  wrong = forks.main(['main.py', 'prune', 'model', 'a.txt', '--workdir', 'out'])
  assert wrong.returncode == 2 and wrong.stderr.startswith("error: '--workdir' is not understood")


def test_an_output_that_lacks_a_character_or_is_closed_does_not_end_a_run(monkeypatch):
  written = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='latin-1'))
  monkeypatch.setattr(cli.app, 'run', lambda *_, **__: print('24–48', flush=True))
  cli.run()
  assert written.getvalue() == b'24?48\n'
  monkeypatch.setattr(sys, 'stdout', None)  # as after `>&-`
  monkeypatch.setattr(cli.app, 'run', lambda *_, **__: cli.processes.write('done'))
  cli.run()


def ended(monkeypatch, error, workdir, mode='prune', debug=False):
  """The exit code of a command whose run raises `error`."""

  def main(*_, **__):
    raise error

  flags = {'_WORKDIR': str(workdir), '_MODE': mode, '_DEBUG': debug}
  for name, value in flags.items():
    monkeypatch.setattr(cli, name, types.SimpleNamespace(value=value))
  monkeypatch.setattr(cli.app, 'run', main)
  with pytest.raises(SystemExit) as caught:
    cli.run()
  return caught.value.code


@pytest.mark.parametrize(
  'kind, mode, started, code',
  [
    (Unreachable, 'prune', True, 75),
    (Unreachable, 'prune', False, 2),
    (Unreachable, 'generate', True, 2),  # of another run's directory
    (InputError, 'prune', True, 2),
  ],
)
def test_a_hub_that_is_away_at_a_restart_is_no_bad_input(
  tmp_path, monkeypatch, capsys, kind, mode, started, code
):
  """Schedulers start a run again unless it ends with code 2."""
  if started:
    (tmp_path / 'run.json').write_text('{}')
  assert ended(monkeypatch, kind('org/texts: not loadable'), tmp_path, mode) == code
  assert capsys.readouterr().err == 'error: org/texts: not loadable\n'


def test_an_unexpected_error_is_one_line_and_a_file_with_the_traceback(tmp_path, monkeypatch, capsys):
  (tmp_path / 'run.json').write_text('{}')
  assert ended(monkeypatch, ZeroDivisionError('a fault\nof ours'), tmp_path) == 1
  (file,) = tmp_path.glob('traceback-*.txt')
  said = capsys.readouterr().err
  assert len(said.splitlines()) == 1 and 'a fault' in said and str(file) in said
  assert 'in main' in file.read_text()
  assert ended(monkeypatch, ZeroDivisionError('a fault'), tmp_path, debug=True) == 1
  assert 'in main' in capsys.readouterr().err and len(list(tmp_path.glob('traceback-*'))) == 1
