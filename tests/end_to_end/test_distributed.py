"""Runs on several processes and devices end as on one; killed, preempted or on other devices they go on."""

import json
import os
import random
import signal
import socket

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from adapt_jax.config.options import MeshOptions
from adapt_jax.machine import mesh, processes
from adapt_jax.models.errors import InputError
from tests.support import runs
from tests.support.forks import shared
from tests.support.starter import Starter

SEED = int(os.environ.get('ADAPT_JAX_TEST_SEED', '0'))  # another one kills at another moment
# Adam blows rounding, which differs with the devices, up to the rate: here five times the paper's. Each step
# waits for the other process many times.
FIELDS = {'train.lr': 1e-4, 'train.min_lr': 1e-5, 'prune.steps': 10, 'evaluate.max_tokens': 256}
FLAGS = tuple(f'--config.{name}={value}' for name, value in FIELDS.items())


@pytest.fixture(scope='module')
def starters(files, tmp_path_factory):
  return [Starter(tmp_path_factory.mktemp('starter'), files, FLAGS, shared(i)) for i in range(2)]


def make_config(files):
  """The same for runs in this process."""
  config = runs.make_config(files)
  config.update_from_flattened_dict(FIELDS)
  return config


@pytest.fixture(scope='module')
def alone(files, tmp_path_factory):
  """The run on one device of one process."""
  path = tmp_path_factory.mktemp('alone') / 'out'
  runs.in_process(make_config(files), path)
  return path


def pair(starters, path, victim=-1, flags=(), **kill):
  """[(exit code, output)] of a run on two processes with two devices each."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'--coordinator_address=127.0.0.1:{probe.getsockname()[1]}'
  for i, starter in enumerate(starters):
    started = (*flags, address, '--num_processes=2', f'--process_id={i}')
    starter.start(path, *started, devices=2, **(kill if i == victim else {}))
  return [starter.wait() for starter in starters]


@pytest.fixture(scope='module')
def together(starters):
  """The undisturbed run of two processes."""
  path = starters[0].path / 'together'
  ends = pair(starters, path)
  assert [code for code, _ in ends] == [0, 0], ends
  assert 'stage 1 recover' in ends[0][1] and 'stage' not in ends[1][1]  # one of them tells
  return path


def assert_same_report(path, reference):
  """Widths, tokens and compiles alike, figures within 1e-5; losses of every step and weights are close."""
  ours, theirs = (runs.read_report(p) for p in (path, reference))
  for stage, expected in zip(ours['stages'], theirs['stages'], strict=True):
    for name in ('num_kv_heads', 'ffn', 'params', 'tokens'):
      assert stage[name] == expected[name]
  for name in ('dense', 'pruned', 'recovered'):
    assert ours['perplexity'][name] == pytest.approx(theirs['perplexity'][name], rel=1e-5)
  assert ours['model'] == theirs['model'] and ours['schedule'] == theirs['schedule']
  logs = [[json.loads(x) for x in (p / 'metrics.jsonl').read_text().splitlines()] for p in (path, reference)]
  assert [row['event'] for row in logs[0]] == [row['event'] for row in logs[1]]
  losses = [[row['loss'] for row in log if 'loss' in row] for log in logs]
  np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
  plans = [json.loads((p / 'plan.json').read_text())['layers'] for p in (path, reference)]
  assert plans[0] == plans[1]
  weights = [load_file(p / 'hf/model.safetensors') for p in (path, reference)]
  for name, expected in weights[1].items():
    np.testing.assert_allclose(weights[0][name], expected, atol=2e-4 * np.abs(expected).max())


def test_two_processes_give_the_report_of_one(alone, together):
  assert_same_report(together, alone)
  assert runs.read_report(together)['compiles']['training'] == 1


@pytest.mark.chaos
def test_one_of_two_killed_at_a_random_moment(starters, together):
  """The other one ends by itself and says what to do; started again, both end with the same bits."""
  path, rng = starters[0].path / 'killed', random.Random(SEED)
  log = [json.loads(x) for x in (together / 'metrics.jsonl').read_text().splitlines()]
  row = rng.choice(log[:-1])
  after, victim = {k: row[k] for k in ('event', 'of', 'stage', 'step') if k in row}, rng.randrange(2)
  ends = pair(starters, path, victim, kill='SIGKILL', after=after)
  moment = f'seed {SEED}: process {victim} after {after}'
  assert ends[victim][0] == -signal.SIGKILL and ends[1 - victim][0] not in (0, 2), moment
  if victim == 1:  # or, if it waited in a barrier and its line came late, in the words of JAX, which ends it
    told = ('start all of them again', 'This most likely indicates that another task died')
    assert any(line in ends[0][1] for line in told), (moment, ends)
  ends = pair(starters, path)
  assert [code for code, _ in ends] == [0, 0], (moment, ends)
  runs.assert_same_end(path, together)


@pytest.mark.chaos
def test_sigterm_to_one_of_two_stops_both(starters, together):
  path = starters[0].path / 'preempted'
  ends = pair(starters, path, 1, kill='SIGTERM', after={'event': 'train', 'step': 2})
  assert [code for code, _ in ends] == [0, 0], ends
  assert 'stopped by SIGTERM at stage' in ends[0][1] and not (path / 'report.json').exists()
  ends = pair(starters, path)
  assert [code for code, _ in ends] == [0, 0] and 'resuming' in ends[0][1]
  runs.assert_same_end(path, together)


def test_bad_input_that_the_first_alone_meets_ends_all_with_code_2(starters):
  """A scheduler must not start them again, and none may wait for the others."""
  for code, output in pair(starters, starters[0].path / 'refused', flags=('--config.data.cache=/proc/none',)):
    assert code == 2 and 'error: data.cache' in output and 'Traceback' not in output


def test_a_run_goes_on_with_other_devices(files, alone, tmp_path, monkeypatch):
  """On four, then on one of them."""
  path = tmp_path / 'moved'
  with monkeypatch.context() as broken, pytest.raises(InputError, match='killed'):
    runs.steps_of(broken, 6)  # saved after step 5
    with jax.set_mesh(mesh.make_mesh(MeshOptions(1, 4, 1))):
      runs.in_process(make_config(files), path)
  runs.in_process(make_config(files), path)
  assert_same_report(path, alone)


ENVIRONMENTS = {
  'srun': ({'SLURM_STEP_NODELIST': 'a[1-2]', 'SLURM_PROCID': '1', 'SLURM_NTASKS': '2'}, True),
  'sbatch without srun': ({'SLURM_PROCID': '0', 'SLURM_NTASKS': '8'}, False),
  'mpirun': ({'OMPI_COMM_WORLD_SIZE': '4'}, True),
  'TPU slice': ({'TPU_WORKER_HOSTNAMES': 'host-0,host-1'}, True),
  'TPU host': ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
  'several slices': ({'MEGASCALE_NUM_SLICES': '2'}, True),
  'Kubernetes job': ({'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '1'}, True),
  'laptop': ({}, False),
}


@pytest.mark.parametrize('environment, expected', ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_schedulers_are_recognised(environment, expected, monkeypatch):
  """JAX itself finds the others; only where there are some is it asked to."""
  calls = []
  monkeypatch.setattr(processes.os, 'environ', environment)
  monkeypatch.setattr(processes.jax.distributed, 'initialize', lambda **kw: calls.append(kw))
  processes.start('auto', '', 0, -1)
  assert calls == ([{}] if expected else [])
  processes.start('off', '', 0, -1)
  assert len(calls) == expected
