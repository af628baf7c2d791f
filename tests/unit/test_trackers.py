"""The trackers' own readers find the log's curves, each point once, after resumes too."""

import pathlib
import sys
from typing import Any

import pytest

from adapt_jax.models.errors import InputError
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.reports import trackers

SETTINGS = {'prune': {'method': 'obs', 'target': 0.8}}


def train(log: MetricsLog, step: int, loss: float) -> None:
  values = {'loss': loss, 'learning_rate': 1e-4 * step, 'gradient_norm': 2.0, 'tokens_per_second': 512.0}
  log.write('train', stage=1, step=step, **values)


def curves(path: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """Tag -> (step, value) of every point, as TensorBoard reads them."""
  accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
  events = accumulator.EventAccumulator(str(path / 'tensorboard'), purge_orphaned_data=False).Reload()
  make_ndarray = pytest.importorskip('tensorboard.util.tensor_util').make_ndarray
  return {
    tag: [(e.step, pytest.approx(float(make_ndarray(e.tensor_proto)))) for e in events.Tensors(tag)]
    for tag in events.Tags()['tensors']
  }


def test_every_scalar_is_a_curve_and_a_resumed_run_has_every_step_once(tmp_path):
  log = MetricsLog(tmp_path / 'metrics.jsonl')
  log.track(['tensorboard'], SETTINGS)
  log.write('evaluate', of='dense', stage=0, step=0, perplexity=20.0)
  log.write('prune', stage=1, step=1, params=900, loss=3.0, ffn=[1, 2])
  log.write('prune', stage=1, step=2, params=800, loss=3.25, ffn=[1, 1])
  log.write('evaluate', of='pruned', stage=1, step=0, perplexity=30.0)
  for step in (1, 2, 3):
    train(log, step, 5.0 - step)
  resumed = MetricsLog(tmp_path / 'metrics.jsonl')
  resumed.cut(5)  # what the checkpoint had seen
  resumed.track(['tensorboard'], SETTINGS)
  train(resumed, 2, 9.0)
  resumed.write('evaluate', of='recovered', stage=1, step=2, perplexity=25.0)
  assert curves(tmp_path) == {
    'perplexity/dense': [(0, 20.0)], 'perplexity/pruned': [(0, 30.0)], 'perplexity/recovered': [(2, 25.0)],
    'prune/params': [(1, 900.0), (2, 800.0)], 'prune/loss': [(1, 3.0), (2, 3.25)],
    'train/loss': [(1, 4.0), (2, 9.0)], 'train/learning_rate': [(1, 1e-4), (2, 2e-4)],
    'train/gradient_norm': [(1, 2.0), (2, 2.0)], 'train/tokens_per_second': [(1, 512.0), (2, 512.0)],
  }  # fmt: skip


@pytest.fixture
def wandb_runs(monkeypatch) -> list[tuple[Any, list[dict[str, float]]]]:
  """Each run that W&B starts, offline, and the values that it is given, with `_step`."""
  wandb, runs = pytest.importorskip('wandb'), []
  monkeypatch.setenv('WANDB_MODE', 'offline')
  init = wandb.init

  def start(**options: Any) -> Any:
    run, rows = init(**options), []
    log = run.log
    monkeypatch.setattr(
      run, 'log', lambda values, step: (rows.append({'_step': step} | values), log(values, step))
    )
    runs.append((run, rows))
    return run

  monkeypatch.setattr(wandb, 'init', start)
  return runs


def test_wandb_offline_and_after_a_resume(tmp_path, wandb_runs):
  log = MetricsLog(tmp_path / 'metrics.jsonl')
  log.track(['wandb'], SETTINGS)
  log.write('evaluate', of='dense', stage=0, step=0, perplexity=20.0)
  log.write('evaluate', of='dense', stage=0, step=0, text='web', perplexity=30.0)
  log.write('prune', stage=1, step=1, params=900, loss=3.0)
  train(log, 1, 2.5)
  log.close()
  resumed = MetricsLog(tmp_path / 'metrics.jsonl')
  resumed.cut(3)  # what the checkpoint had seen
  resumed.track(['wandb'], SETTINGS)
  train(resumed, 1, 2.25)
  resumed.close()
  (run_1, rows_1), (run_2, rows_2) = wandb_runs
  assert run_1.id == run_2.id == (tmp_path / 'wandb/id.txt').read_text().strip()
  assert dict(run_1.config)['prune'] == SETTINGS['prune'] and list(
    tmp_path.glob('wandb/offline-run-*/*.wandb')
  )
  before = [
    {'_step': 0, 'perplexity/dense': 20.0, 'train/step': 0},
    {'_step': 1, 'perplexity/web/dense': 30.0, 'train/step': 0},
    {'_step': 2, 'prune/params': 900, 'prune/loss': 3.0, 'prune/step': 1},
  ]
  fixed = {'train/learning_rate': 1e-4, 'train/gradient_norm': 2.0, 'train/tokens_per_second': 512.0}
  for rows, loss in ((rows_1, 2.5), (rows_2, 2.25)):
    assert rows == [*before, {'_step': 3, 'train/step': 1, 'train/loss': loss} | fixed]


def test_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch):
  pytest.importorskip('wandb').teardown()  # it remembers the environment
  monkeypatch.setenv('WANDB_MODE', 'online')
  monkeypatch.setenv('WANDB_API_KEY', 'too-short')
  with pytest.raises(InputError, match=r'tracker: W&B does not start \(.+WANDB_MODE=offline'):
    MetricsLog(tmp_path / 'metrics.jsonl').track(['wandb'], SETTINGS)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(InputError, match=r"tracker has 'wandb', .* pip install 'adapt-jax\[wandb\]'"):
    trackers.check(['wandb'])
