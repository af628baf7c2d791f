"""The files of launch/: what a scheduler is told fits main.py, and they start again what is not finished."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

import adapt_jax.cli  # noqa: F401  defines the flags
from tests.support import runs

LAUNCH = runs.ROOT / 'launch'

# Starts SLURM_NTASKS processes as srun does, and ends with their highest exit code.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & children+=($!)
done
highest=0
for child in "${children[@]}"; do
  wait "$child"; code=$?
  if ((code > highest)); then highest=$code; fi
done
exit $highest
"""
# A run that stops with exit code $CODE; with $FINISH it writes its report.
PYTHON = """#!/usr/bin/env bash
workdir=${2#--workdir=}
mkdir -p "$workdir"
if [[ ${FINISH:-} ]]; then touch "$workdir/report.json"; fi
exit "$CODE"
"""


def write_program(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return path


@pytest.fixture
def slurm(tmp_path):
  """Starts slurm.sbatch as SLURM does, with two tasks; gives exit code, output, whether it is requeued."""
  queue = tmp_path / 'queue'
  write_program(tmp_path / 'srun', SRUN)
  write_program(tmp_path / 'scontrol', f'#!/bin/sh\necho "$@" >> {queue}\n')
  job = {'SLURM_JOB_ID': str(free_job()), 'SLURM_NTASKS': '2', 'HOME': str(tmp_path), 'JAX_PLATFORMS': 'cpu'}

  def start(*args, **environment):
    queue.unlink(missing_ok=True)
    done = subprocess.run(
      ['bash', LAUNCH / 'slurm.sbatch', *map(str, args)],
      cwd=runs.ROOT,
      env=os.environ | job | {'PATH': f'{tmp_path}:{os.environ["PATH"]}'} | environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=600,
      check=False,
    )
    requeued = queue.read_text() if queue.exists() else ''
    assert requeued in ('', f'requeue {job["SLURM_JOB_ID"]}\n')
    return done.returncode, done.stdout, bool(requeued)

  return start


def free_job():
  """A job number for which JAX chooses a free port."""
  for job in range(os.getpid() % 4096, 8192):  # tests beside this one begin elsewhere
    with contextlib.suppress(OSError), socket.socket() as probe:
      probe.bind(('localhost', 61440 + job % 4096))
      return job % 4096
  raise AssertionError('no free port')


def test_two_processes_of_srun_are_one_run(slurm, tmp_path):
  """JAX finds them by SLURM's variables."""
  files = runs.make_files(tmp_path)
  recipe = runs.command(files, tmp_path)[2]
  workdir = tmp_path / 'out'
  code, output, requeued = slurm(workdir, recipe, '--mode=evaluate', PYTHON=sys.executable)
  assert (code, requeued) == (0, False), output
  assert runs.read_report(workdir)['perplexity']['dense'] > 1
  assert output.count(' parameters, perplexity ') == 1, 'two runs, not one of two processes'


def test_slurm_starts_containers_by_pyxis(slurm, tmp_path):
  write_program(tmp_path / 'srun', '#!/bin/sh\nprintf "%s\\n" "$JAX_PLATFORMS" "$@"\nexit 2\n')
  given = {'CONTAINER': 'registry#adapt-jax:1', 'MOUNTS': '/data:/data', 'PYTHON': '', 'HF_HOME': '/hub'}
  given |= {'JAX_COMPILATION_CACHE_DIR': '', 'JAX_PLATFORMS': ''}
  _, output, _ = slurm(tmp_path / 'out', '--config=base', **given)
  lines, here = output.splitlines(), str(runs.ROOT)
  assert lines[0] == 'cuda', 'JAX would fall back to the CPU'
  cache = tmp_path / '.cache/adapt-jax/xla'
  assert '--container-image=registry#adapt-jax:1' in lines and f'--container-workdir={here}' in lines
  assert f'--container-mounts={here}:{here},{cache}:{cache},/hub:/hub,/data:/data' in lines
  assert lines[-4:] == ['python', 'main.py', f'--workdir={tmp_path / "out"}', '--config=base']


@pytest.mark.parametrize(
  ('run', 'code', 'requeued'),
  [
    ({'CODE': '0', 'FINISH': '1'}, 0, False),
    ({'CODE': '0'}, 0, True),  # SIGTERM: saved, not finished
    ({'CODE': '1', 'SLURM_RESTART_COUNT': '100'}, 1, False),
    ({'CODE': '2'}, 2, False),
  ],
)
def test_slurm_puts_back_what_is_not_finished(slurm, tmp_path, run, code, requeued):
  python = write_program(tmp_path / 'stand-in', PYTHON)
  found = slurm(tmp_path / 'out', PYTHON=str(python), **run)
  assert (found[0], found[2]) == (code, requeued), found[1]


@pytest.mark.parametrize(
  ('run', 'code'),
  [({'CODE': '0', 'FINISH': '1'}, 0), ({'CODE': '0'}, 75), ({'CODE': '1'}, 1), ({'CODE': '2'}, 2)],
)
def test_a_pod_succeeds_only_at_the_end(tmp_path, run, code):
  python = write_program(tmp_path / 'stand-in', PYTHON)
  command = ['bash', LAUNCH / 'pod.sh', tmp_path / 'out']
  done = subprocess.run(command, env=os.environ | run | {'PYTHON': str(python)}, check=False)
  assert done.returncode == code


def test_a_pod_passes_sigterm_on_and_waits(tmp_path):
  """The child saves for a while after the signal; the pod must not end before it."""
  python = write_program(
    tmp_path / 'stand-in',
    '#!/usr/bin/env bash\n'
    f'trap "sleep 0.5; touch {tmp_path}/saved; exit 0" TERM\n'
    f'touch {tmp_path}/started\n'
    'while true; do sleep 0.05; done\n',
  )
  pod = subprocess.Popen(
    ['bash', LAUNCH / 'pod.sh', tmp_path / 'out'],
    env=os.environ | {'PYTHON': str(python)},
  )
  while not (tmp_path / 'started').exists():
    assert pod.poll() is None
  pod.send_signal(signal.SIGTERM)
  assert pod.wait(timeout=60) == 75 and (tmp_path / 'saved').exists()


def test_the_jobset_counts_its_processes_alike_and_fails_at_once_for_bad_input():
  """JobSet names pods JOBSET-REPLICATEDJOB-JOB-POD, and its service as itself."""
  yaml = pytest.importorskip('yaml', reason='PyYAML is not installed')
  found = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  (workers,) = found['spec']['replicatedJobs']
  job = workers['template']['spec']
  (container,) = job['template']['spec']['containers']
  given = dict(arg[2:].split('=', 1) for arg in container['args'][1:])
  assert job['completionMode'] == 'Indexed' and workers['replicas'] == 1
  assert int(given['num_processes']) == job['completions'] == job['parallelism'] > 1
  name = found['metadata']['name']
  assert given['coordinator_address'].split(':')[0] == f'{name}-{workers["name"]}-0-0.{name}'
  assert given['config.mesh.data'] == given['num_processes']
  assert given['process_id'] == '$(JOB_COMPLETION_INDEX)'
  assert {'name': 'JAX_PLATFORMS', 'value': 'cuda'} in container['env']
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob' and rule['onExitCodes']['values'] == [2]
  assert rule['onExitCodes']['containerName'] == container['name']
  assert job['template']['spec']['restartPolicy'] == 'Never' and job['backoffLimit'] == 0
  (rule,) = found['spec']['failurePolicy']['rules']
  assert (rule['action'], rule['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
