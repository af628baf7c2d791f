"""Runs that version 0.1 began are finished by this one."""

import json
import pathlib
import shutil
import subprocess
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ROOT / 'tests/data/workdirs-0.1'
# Workdir -> what the resumed run says first: one was stopped while it trained, one killed while it pruned.
RESUMED = {
  'training': 'resuming at stage 2, training step 9',
  'pruning': 'resuming the pruning of stage 2, after step 17',
}


@pytest.mark.parametrize('name', RESUMED)
def test_a_run_of_version_0_1_goes_on(name, tmp_path):
  shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
  with tarfile.open(FILES / f'{name}.tar.gz') as archive:
    archive.extractall(tmp_path, filter='data')
  command = [sys.executable, str(ROOT / 'main.py'), '--config=recipe.py', f'--workdir={name}']
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
  assert done.returncode == 0 and RESUMED[name] in done.stdout, done.stdout + done.stderr
  report, end = (
    json.loads(path.read_text()) for path in (tmp_path / name / 'report.json', FILES / 'end.json')
  )
  # Its figures are of another machine, which may round otherwise.
  for stage, expected in zip(report['stages'], end['stages'], strict=True):
    assert stage.pop('seconds') > 0 and stage.pop('texts', {}).keys() <= {'text'}  # not known in 0.1
    for figure in ('perplexity_pruned', 'perplexity_recovered'):
      assert stage.pop(figure) == pytest.approx(expected.pop(figure), rel=1e-3)
    assert stage == expected
  assert report['perplexity']['dense'] == pytest.approx(end['perplexity']['dense'], rel=1e-5)
  rows = map(json.loads, (tmp_path / name / 'metrics.jsonl').read_text().splitlines())
  steps = [row['step'] for row in rows if row['event'] == 'train']
  assert steps == list(range(1, 13))
  assert 'stage 1 pruned: ' in (tmp_path / name / 'report.html').read_text()
