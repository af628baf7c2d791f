"""The run's log."""

import pytest

from adapt_jax.models.errors import InputError
from adapt_jax.pipeline.metrics import MetricsLog


def test_a_line_that_a_crash_cut_is_removed_and_a_resume_cuts_further(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log = MetricsLog(path)
  for step in range(3):
    log.write('evaluate', of='pruned', stage=1, step=step, text='text', perplexity=4.0)
  path.write_bytes(path.read_bytes() + b'{"event": "tr')
  again = MetricsLog(path)
  assert again.lines == 3 and [row['step'] for row in again.read()] == [0, 1, 2]
  again.cut(1)
  again.write('evaluate', of='pruned', stage=1, step=9, text='text', perplexity=4.0)
  assert [row['step'] for row in MetricsLog(path).read()] == [0, 9]


@pytest.mark.parametrize('line', [b'nonsense', b'{}', b'[1]', b'\xff'])
def test_a_damaged_line_is_refused_before_anything_is_computed(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"event": "train"}\n' + line + b'\n{"event": "train"}\n')
  with pytest.raises(InputError, match='line 2 of .*metrics.jsonl.*: repair it, or move the file away'):
    MetricsLog(path)
