"""The run's log."""

import json

from adapt_jax.pipeline.metrics import MetricsLog

LAYERS = ('layer_importance', 'sparsity', 'kv_groups', 'ffn')
CURVES = ('loss', 'learning_rate', 'gradient_norm', 'tokens_per_second')


def test_lines_of_version_0_1_are_read_as_those_of_today(tmp_path):
  """A run that began there and goes on here has one kind of line for its page."""
  path = tmp_path / 'metrics.jsonl'
  earlier = [
    {'event': 'evaluate', 'of': 'dense', 'step': 0, 'perplexity': 20.0},
    {'event': 'prune', 'stage': 1, 'step': 1, 'params': 900, 'loss': 3.0} | dict.fromkeys(LAYERS, [1, 2]),
    {'event': 'evaluate', 'of': 'stage 1 pruned', 'step': 0, 'perplexity': 30.0},
    {'event': 'train', 'stage': 1, 'step': 1} | dict.fromkeys(CURVES, 1.0),
    {'event': 'evaluate', 'of': 'stage 1 recovered', 'step': 1, 'perplexity': 25.0},
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in earlier))
  log = MetricsLog(path)
  log.write('evaluate', of='pruned', stage=2, step=1, perplexity=40.0)
  found = [(row['of'], row['stage']) for row in log.read() if row['event'] == 'evaluate']
  assert found == [('dense', 0), ('pruned', 1), ('recovered', 1), ('pruned', 2)]


def test_a_stage_of_version_0_1_without_any_step(tmp_path):
  """Its target was reached already: there is an evaluation of it and nothing else."""
  path = tmp_path / 'metrics.jsonl'
  titles = ('dense', 'stage 1 pruned', 'stage 2 pruned')
  rows = [{'event': 'evaluate', 'of': of, 'step': 0, 'perplexity': 20.0} for of in titles]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  found = [(row['of'], row['stage']) for row in MetricsLog(path).read()]
  assert found == [('dense', 0), ('pruned', 1), ('pruned', 2)]
