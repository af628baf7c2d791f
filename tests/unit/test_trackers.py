"""The trackers' own readers find the log's curves, each point once, after resumes too."""

import json
import pathlib
import struct
import sys
import time
from collections.abc import Iterator

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
  log.write('sensitivity', base=0.0, layer=1, perplexity=3.0)  # no curve over steps
  for step in (1, 2, 3):
    train(log, step, 5.0 - step)
  resumed = MetricsLog(tmp_path / 'metrics.jsonl')
  resumed.cut(6)  # what the checkpoint had seen
  resumed.track(['tensorboard'], SETTINGS)
  train(resumed, 2, 9.0)
  resumed.write('evaluate', of='recovered', stage=1, step=2, perplexity=25.0)
  assert curves(tmp_path) == {
    'perplexity/dense': [(0, 20.0)],
    'perplexity/pruned': [(0, 30.0)],
    'perplexity/recovered': [(2, 25.0)],
    'prune/params': [(1, 900.0), (2, 800.0)],
    'prune/loss': [(1, 3.0), (2, 3.25)],
    'train/loss': [(1, 4.0), (2, 9.0)],
    'train/learning_rate': [(1, 1e-4), (2, 2e-4)],
    'train/gradient_norm': [(1, 2.0), (2, 2.0)],
    'train/tokens_per_second': [(1, 512.0), (2, 512.0)],
  }


def wandb_records(data: bytes) -> Iterator[bytes]:
  """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB after a header of 7 bytes."""
  position, record = 7, b''
  while position < len(data):
    if (left := 32_768 - position % 32_768) < 7:
      position += left
      continue
    length, kind = struct.unpack_from('<HB', data, position + 4)
    record += data[position + 7 : position + 7 + length]
    position += 7 + length
    if kind in (1, 4):  # whole, or the last part
      yield record
      record = b''


def wandb_runs(path: pathlib.Path) -> list[tuple[str, dict[str, str], list[dict[str, float]]]]:
  """(id, config, rows of history) of each start of a run, as `wandb sync` reads them."""
  proto = pytest.importorskip('wandb.proto.wandb_internal_pb2')
  found = []
  for file in sorted(path.glob('wandb/offline-run-*/*.wandb'), key=lambda f: f.stat().st_mtime_ns):
    run, config, history = '', {}, []
    for data in wandb_records(file.read_bytes()):
      record = proto.Record.FromString(data)
      if record.HasField('run'):
        run, config = record.run.run_id, {x.key: x.value_json for x in record.run.config.update}
      if record.HasField('history'):
        items = {x.key or '/'.join(x.nested_key): json.loads(x.value_json) for x in record.history.item}
        history.append({k: v for k, v in items.items() if k == '_step' or not k.startswith('_')})
    found.append((run, config, history))
  return found


def test_wandb_offline_and_after_a_resume(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  path = tmp_path / 'metrics.jsonl'
  log = MetricsLog(path)
  log.track(['wandb'], SETTINGS)
  log.write('evaluate', of='dense', stage=0, step=0, perplexity=20.0)
  log.write('evaluate', of='dense', stage=0, step=0, text='web', perplexity=30.0)
  log.write('prune', stage=1, step=1, params=900, loss=3.0)
  train(log, 1, 2.5)
  log.close()
  time.sleep(1.1)  # W&B names directories by the second
  resumed = MetricsLog(path)
  resumed.cut(3)  # what the checkpoint had seen
  resumed.track(['wandb'], SETTINGS)
  train(resumed, 1, 2.25)
  resumed.close()
  before = [
    {'_step': 0, 'perplexity/dense': 20.0, 'train/step': 0},
    {'_step': 1, 'perplexity/web/dense': 30.0, 'train/step': 0},
    {'_step': 2, 'prune/params': 900, 'prune/loss': 3.0, 'prune/step': 1},
  ]
  fixed = {'train/learning_rate': 1e-4, 'train/gradient_norm': 2.0, 'train/tokens_per_second': 512.0}
  deadline = time.monotonic() + 60
  while (found := wandb_runs(tmp_path)) and not (
    len(found) == 2 and all(run and rows for run, _, rows in found)
  ):
    assert time.monotonic() < deadline, found  # W&B's own process may still be writing
    time.sleep(0.2)
  (id_1, config, rows_1), (id_2, _, rows_2) = found
  assert id_1 == id_2 == (tmp_path / 'wandb/id.txt').read_text().strip()
  assert json.loads(config['prune']) == SETTINGS['prune']
  assert rows_1 == [*before, {'_step': 3, 'train/step': 1, 'train/loss': 2.5} | fixed]
  assert rows_2 == [*before, {'_step': 3, 'train/step': 1, 'train/loss': 2.25} | fixed]


def test_wandb_that_cannot_start_is_one_line(tmp_path, monkeypatch):
  pytest.importorskip('wandb').teardown()  # it remembers the environment
  monkeypatch.setenv('WANDB_MODE', 'online')
  monkeypatch.setenv('WANDB_API_KEY', 'too-short')
  with pytest.raises(InputError, match=r'tracker: W&B does not start \(.+WANDB_MODE=offline'):
    MetricsLog(tmp_path / 'metrics.jsonl').track(['wandb'], SETTINGS)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(InputError, match=r"tracker has 'wandb', .* pip install '\.\[wandb\]'"):
    trackers.check(['wandb'])
