import itertools
import json

import numpy as np
import pytest

from benchmarks import equal_layers

HEAD_DIM = 4


def brute_force(layers, runs):
  """The least padding over all ways to cut the layers into so many runs."""
  totals = []
  for cuts in itertools.combinations(range(1, len(layers)), runs - 1):
    total = 0
    for start, stop in itertools.pairwise((0, *cuts, len(layers))):
      widest = [max(width) for width in zip(*layers[start:stop], strict=True)]
      total += (stop - start) * equal_layers.arithmetic(tuple(widest), HEAD_DIM)
    totals.append(total)
  return min(totals) / sum(equal_layers.arithmetic(layer, HEAD_DIM) for layer in layers) - 1


@pytest.mark.parametrize('seed', range(3))
def test_the_least_padding_is_found(seed):
  draw = np.random.default_rng(seed)
  layers = [(3 * groups, groups, channels) for groups, channels in draw.integers(1, 9, (7, 2)).tolist()]
  found = equal_layers.padding(layers, HEAD_DIM)
  assert found == pytest.approx([brute_force(layers, runs) for runs in range(1, 8)])
  assert found[-1] == 0 < found[0]


def test_equal_neighbours_need_no_padding():
  assert equal_layers.padding([(3, 1, 5)] * 2 + [(6, 2, 9)] * 3, HEAD_DIM)[1:] == [0] * 4


def test_it_reads_the_report_of_a_run(tmp_path, capsys):
  """The second layer was removed. The others are two runs without padding, or one with 4 more channels."""
  stage = {'num_heads': [6, 0, 6, 6], 'num_kv_heads': [2, 0, 2, 2], 'ffn': [8, 0, 8, 4]}
  (tmp_path / 'report.json').write_text(json.dumps({'stages': [{'num_heads': []}, stage]}))
  equal_layers.main([str(tmp_path), '--head_dim=4'])
  row = capsys.readouterr().out.splitlines()[-1]
  weights = 3 * 2 * (6 + 2) * 4 + 3 * (8 + 8 + 4)
  share = f'{3 * 4 / weights:.1%}'
  assert row == f'| {tmp_path.name} | ' + ' | '.join(['0.0%'] * 4 + [share] * 2) + ' |' and share != '0.0%'
