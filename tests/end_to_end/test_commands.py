"""main.py from the command line: exit codes, what it prints where, and the modes that need no workdir."""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
from xml.etree import ElementTree

import pytest

from adapt_jax import cli
from adapt_jax.configs import published
from adapt_jax.machine import targets
from adapt_jax.machine.targets import TARGETS
from adapt_jax.models.errors import InputError, Unreachable
from adapt_jax.models.formats.source import open_source
from adapt_jax.pruning import serving_widths
from tests.support import runs
from tests.unit.test_run_page import assert_inside, make_report


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return runs.make_files(tmp_path_factory.mktemp('files'))


COMMANDS = [
  (['--config.prune.targt=0.5'], '--config.prune.targt is unknown: did you mean --config.prune.target?'),
  (
    ['--config.model=x'],
    "config.model = 'x', but config.model is a group of options: set one of model.source,",
  ),
  (['--target=0.5'], '--target is unknown: did you mean --config.prune.target?'),
  (['--config.prune.stages=many'], "prune.stages = 'many' must be a whole number"),
  (
    ['--config.evaluate.source=(a.txt'],
    "evaluate.source = '(a.txt' must be names separated by commas",
  ),
  (["--config.evaluate.source=('a.txt')"], """evaluate.source = "('a.txt')" must be names"""),
  (['--config.evaluate.source=(1)'], "evaluate.source = '(1)' must be names separated by commas"),
  (['--config.train.tokens=10M'], "train.tokens = '10M' must be a whole number, such as 10_000_000"),
  (['--config.train.lr=high'], "train.lr = 'high' must be a number"),
  (['--config.compare.recover=maybe'], "compare.recover = 'maybe' must be True or False"),
  (['--config.train.micro_batch=0'], 'train.micro_batch = 0'),
  (['--config.mesh.fsdp=3'], 'config.mesh (data = 1, fsdp = 3, tensor = 1) asks for 3 devices'),
  (['--num_processes=2'], '--coordinator_address'),
  (['--config=configs/absent.py'], 'absent.py'),
  (['--config=configs/absent.py', '--config.train.lr=1e-4'], '--config=configs/absent.py: no such file'),
  (['--config', 'bse', '--config.train.lr=1e-4'], '--config=bse: no such file or recipe'),
  (['--mode=walk'], 'walk'),
  (['--mode=prun', '--help'], '--mode=prun is unknown: choose accel, prune'),
  (['--workdri=x'], '--workdri is unknown: did you mean --workdir?'),
  (['stray'], 'stray'),
  (['--flagfile'], '--flagfile with no argument'),
  (['--flagfile=absent.flags'], '--flagfile=absent.flags cannot be read'),
  (['--flagfile=tests'], 'tests is a directory, not a file'),
  (['--flagfile', '/dev/null'], '/dev/null is a device, not a file'),
]


@pytest.mark.parametrize('flags,word', COMMANDS, ids=lambda x: str(x))
def test_command_line_exits_with_2_and_one_line(files, tmp_path, flags, word):
  result = runs.main(files, tmp_path / 'out', *flags)
  assert result.returncode == 2, result.stderr
  assert word in result.stderr and result.stderr.startswith('error: ')
  assert len(result.stderr.splitlines()) == 1 and not result.stdout
  assert not os.path.exists(tmp_path / 'out')


def test_a_pipe_of_flags_is_refused_without_waiting_for_a_writer(files, tmp_path):
  """In a process of its own: config_flags would read the pipe when main.py is imported."""
  os.mkfifo(tmp_path / 'flags')
  command = runs.command(files, tmp_path / 'out', f'--flagfile={tmp_path / "flags"}')
  result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 2 and 'flags is a named pipe, not a file' in result.stderr


def test_a_file_of_flags_is_read(files, tmp_path):
  (tmp_path / 'flags').write_text('--config.mesh.fsdp=3\n')
  result = runs.main(files, tmp_path / 'out', f'--flagfile={tmp_path / "flags"}')
  assert result.returncode == 2 and 'config.mesh (data = 1, fsdp = 3' in result.stderr


def test_files_are_named_without_a_tuple(files, tmp_path):
  flag = f'--config.train.source={files / "train.txt"},{files / "absent file.txt"}'
  result = runs.main(files, tmp_path / 'out', flag)
  assert result.returncode == 2 and 'train.source' in result.stderr
  assert 'absent file.txt' in result.stderr and 'no such file' in result.stderr


@pytest.mark.parametrize(
  'body',
  ['def get_config(:', 'import nothing_here', 'def get_config(): return {}[1]', 'def get_config(): pass'],
)
def test_a_broken_recipe_is_one_line(files, tmp_path, body):
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(body)
  result = runs.main(files, tmp_path / 'out', f'--config={recipe}', '--config.train.lr=1e-4')
  assert result.returncode == 2 and 'recipe.py' in result.stderr
  assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
  'body,says',
  [
    ('def get_cfg(): pass', 'the file has no function get_config()'),
    (
      'from adapt_jax.configs import base\ndef get_config():\n  c = base.get_config()\n'
      "  c.prune.target = '0.75x'\n  return c",
      "target = '0.75x' in the recipe must be a number",
    ),
    (
      'from adapt_jax.configs import base\ndef get_config():\n  c = base.get_config()\n'
      '  c.prnue.target = 0.7\n  return c',
      'no option prnue',
    ),
    ("def get_config(): raise ValueError('no such variant')", 'recipe.py: no such variant'),
  ],
)
def test_mistakes_of_a_recipe_are_named(tmp_path, body, says):
  recipe = tmp_path / 'recipe.py'
  recipe.write_text(body)
  result = runs.forks.main(
    [str(runs.ROOT / 'main.py'), f'--config={recipe}', f'--workdir={tmp_path / "out"}']
  )
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and says in result.stderr


def test_a_damaged_model_is_one_line_through_the_command(files, tmp_path):
  path = tmp_path / 'damaged'
  shutil.copytree(files / 'model', path)
  (path / 'config.json').write_text('{')
  result = runs.main(files, tmp_path / 'out', f'--config.model.source={path}')
  assert result.returncode == 2 and 'config.json' in result.stderr
  assert len(result.stderr.splitlines()) == 1 and not (tmp_path / 'out').exists()


def test_an_unknown_variant_is_one_line_that_names_the_choices(tmp_path):
  command = [sys.executable, 'main.py', f'--workdir={tmp_path / "out"}']
  command += ['--config=configs/published.py:mobilellm_350m_to_125']
  result = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 2 and result.stderr.count('\n') == 1, result.stderr
  assert result.stderr.startswith('error: ') and all(name in result.stderr for name in published.RUNS)


def test_mode_estimate_needs_only_a_config(files, tmp_path):
  """No weights, no texts, no workdir; simulated devices; nothing is written."""
  shapes = tmp_path / 'shapes'
  shapes.mkdir()
  (shapes / 'config.json').write_text((files / 'model/config.json').read_text())
  flags = (f'--config.model.source={shapes}', '--config.estimate.devices=2')
  result = runs.main(files, tmp_path / 'out', '--mode=estimate', *flags)
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  table = {cells[1].strip(): cells[2:-1] for cells in (line.split('|') for line in lines) if len(cells) == 8}
  titles = ['stacking', 'scoring', 'scoring', 'compensation', 'correction', 'compaction', 'training']
  assert [t.split(',')[0].split(' ')[0] for t in list(table)[2:9]] == titles
  assert 'on 2 devices (data 1, fsdp 2, tensor 1), products in bfloat16' in result.stdout
  assert any(line.startswith('peak 0.0 GB of 80 GB') for line in lines)
  assert re.search(r'the whole run at these peaks: \S+ device-hours, \S+ s, for products alone$', lines[-1])
  assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(not targets.missing(TARGETS['tpu-v6e']), reason='the compiler is installed')
def test_an_estimate_without_the_compiler_says_what_to_install(files, tmp_path):
  """It compiles for simulated devices, and compares with the target's memory and speed."""
  flags = ['--config.estimate.target=tpu-v6e', '--config.estimate.devices=2', '--config.estimate.price=1e9']
  result = runs.main(files, tmp_path / 'out', '--mode=estimate', *flags, '--config.train.tokens=1000000000')
  assert result.returncode == 0, result.stderr
  assert "its compiler is not installed; pip install 'adapt-jax[estimate]' installs it" in result.stdout
  assert 'GB of 32 GB per device: fits' in result.stdout and 'at 918 TFLOP/s' in result.stdout
  hours, cost = re.search(
    r'peaks: (\S+) device-hours, .* costs ([\d.,]+), for products alone', result.stdout
  ).groups()
  assert float(cost.replace(',', '')) == pytest.approx(1e9 * float(hours), rel=0.01)


def test_from_the_command_line_without_a_workdir(files):
  flags = [
    '--mode=generate',
    '--prompt=the union',
    '--prompt=of, "need"',
    '--config.generate.max_new_tokens=4',
  ]
  done = runs.main(files, '', *flags)
  assert done.returncode == 0, done.stderr
  assert '== the union' in done.stdout and '== of, "need"' in done.stdout
  refused = runs.main(files, '', '--mode=generate')
  assert refused.returncode == 2 and refused.stderr.startswith('error: --prompt is empty')


def test_mode_prune_keeps_to_widths_for_serving(files, tmp_path):
  flags = '--config.prune.serve=tensor_parallel=3', '--config.prune.method=obs', '--config.prune.stages=1'
  result = runs.main(files, tmp_path / 'out', '--mode=prune', '--config.evaluate.source=', *flags)
  assert result.returncode == 0, result.stderr
  saved = open_source(str(tmp_path / 'out/hf')).config
  serving_widths.check_model('tensor_parallel=3', saved)
  assert min(s.ffn for s in saved.layers) < 48


def test_trackers_are_loaded_where_they_are_named_only():
  names = "{'tensorboard', 'wandb'}"
  code = f'import sys; from adapt_jax.pipeline import run; sys.exit(bool({names} & set(sys.modules)))'
  subprocess.run([sys.executable, '-c', code], check=True, cwd=runs.ROOT)


def test_trackers_get_the_curves(files, tmp_path):
  pytest.importorskip('tensorboard')
  pytest.importorskip('wandb')
  flags = '--mode=prune', '--config.tracker=tensorboard,wandb'
  command = runs.command(files, tmp_path / 'out', *flags)
  subprocess.run(command, check=True, cwd=runs.ROOT, env=os.environ | {'WANDB_MODE': 'offline'})
  assert list(tmp_path.glob('out/tensorboard/events.*'))
  assert list(tmp_path.glob('out/wandb/offline-run-*/*.wandb'))


def test_the_picture_for_the_readme(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'report.json').write_text(json.dumps(make_report()))
  script = [
    sys.executable,
    str(runs.ROOT / 'scripts/plot_report.py'),
    str(tmp_path),
    str(tmp_path / 'out.svg'),
  ]
  subprocess.run(script, check=True, cwd=tmp_path)
  root = ElementTree.parse(tmp_path / 'out.svg').getroot()
  name = '{http://www.w3.org/2000/svg}'
  assert root.tag == f'{name}svg'
  assert root.findall(f'{name}rect')[0].attrib['fill'] == '#ffffff'
  pictures = root.findall(f'{name}svg')
  assert [picture.attrib['aria-label'] for picture in pictures] == [
    'Perplexity on held-out text',
    'MLP channels, after stage 2',
    'KV heads, after stage 2',
  ]
  for i, picture in enumerate(pictures):
    assert_inside(picture)
    place = [float(picture.attrib[k]) for k in ('x', 'y', 'width', 'height')]
    assert place == [16 if i == 0 else 472, 196 if i == 2 else 16, 440, 360 if i == 0 else 180]


def test_an_output_that_lacks_a_character_or_is_closed_does_not_end_a_run(monkeypatch):
  written = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='latin-1'))
  monkeypatch.setattr(cli.app, 'run', lambda *_, **__: print('24–48', flush=True))
  cli.run()
  assert written.getvalue() == b'24?48\n'
  monkeypatch.setattr(sys, 'stdout', None)  # as after `>&-`
  monkeypatch.setattr(cli.app, 'run', lambda *_, **__: cli.processes.write('done'))
  cli.run()


@pytest.mark.parametrize(
  'error, mode, started, code',
  [
    (Unreachable, 'prune', True, 75),
    (Unreachable, 'prune', False, 2),
    (Unreachable, 'generate', True, 2),  # of another run's directory
    (InputError, 'prune', True, 2),
  ],
)
def test_a_hub_that_is_away_at_a_restart_is_no_bad_input(
  tmp_path, monkeypatch, capsys, error, mode, started, code
):
  """Schedulers start a run again unless it ends with code 2."""

  def main(*_, **__):
    raise error('org/texts: not loadable')

  def leave(code):
    raise SystemExit(code)

  monkeypatch.setattr(cli.app, 'run', main)
  monkeypatch.setattr(cli.processes, 'leave', leave)
  monkeypatch.setattr(cli, '_WORKDIR', types.SimpleNamespace(value=str(tmp_path), present=True))
  monkeypatch.setattr(cli, '_MODE', types.SimpleNamespace(value=mode))
  if started:
    (tmp_path / 'run.json').write_text('{}')
  with pytest.raises(SystemExit) as caught:
    cli.run()
  assert caught.value.code == code and capsys.readouterr().err == 'error: org/texts: not loadable\n'
