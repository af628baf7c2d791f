"""TensorBoard's own reader finds the log's curves, each point once, after resumes too."""

import pathlib

import pytest

from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.reports import tensorboard


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


def test_every_scalar_is_a_curve(tmp_path):
  log = MetricsLog(tmp_path / 'metrics.jsonl')
  log.write('evaluate', of='dense', stage=0, step=0, perplexity=20.0)
  log.write('prune', stage=1, step=1, params=900, loss=3.0, ffn=[1, 2])
  log.write('prune', stage=1, step=2, params=800, loss=3.25, ffn=[1, 1])
  log.write('evaluate', of='pruned', stage=1, step=0, perplexity=30.0)
  train(log, 1, 2.5)
  train(log, 2, 2.25)
  log.write('evaluate', of='recovered', stage=1, step=2, perplexity=25.0)
  log.write('sensitivity', base=0.0, layer=1, perplexity=3.0)  # no curve over steps
  assert curves(tmp_path) == {
    'perplexity/dense': [(0, 20.0)],
    'perplexity/pruned': [(0, 30.0)],
    'perplexity/recovered': [(2, 25.0)],
    'prune/params': [(1, 900.0), (2, 800.0)],
    'prune/loss': [(1, 3.0), (2, 3.25)],
    'train/loss': [(1, 2.5), (2, 2.25)],
    'train/learning_rate': [(1, 1e-4), (2, 2e-4)],
    'train/gradient_norm': [(1, 2.0), (2, 2.0)],
    'train/tokens_per_second': [(1, 512.0), (2, 512.0)],
  }


def test_a_resumed_run_has_every_step_once(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  first = MetricsLog(path)
  for step in (1, 2, 3, 4):
    train(first, step, 5.0 - step)
  with open(path, 'a') as file:
    file.write('{"event": "tra')  # the machine died here
  resumed = MetricsLog(path)
  assert resumed.lines == 4 and len(resumed.read()) == 4
  resumed.cut(2)  # what the checkpoint had seen
  train(resumed, 3, 9.0)
  assert curves(tmp_path)['train/loss'] == [(1, 4.0), (2, 3.0), (3, 9.0)]


def test_without_the_extra_there_is_only_the_log(tmp_path, monkeypatch):
  monkeypatch.setattr(tensorboard, 'installed', lambda: False)
  log = MetricsLog(tmp_path / 'metrics.jsonl')
  train(log, 1, 1.0)
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']
