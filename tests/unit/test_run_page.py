"""report.html: what a reader looks for is there, whatever is known; it needs nothing else, and is escaped."""

import copy
import math
import os
import pathlib
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from adapt_jax.reports.run_page import render, write

COMMAND = 'python main.py --config=a.py --config.model.source="<i>&\'x\'" --workdir=out'
STAGES: list[dict[str, Any]] = [
  {
    'stage': 1, 'target': 900_000, 'params': 899_679, 'num_heads': [8] * 4, 'num_kv_heads': [4, 4, 4, 3],
    'ffn': [96, 90, 79, 70], 'perplexity_pruned': 41.25, 'perplexity_recovered': 31.5, 'tokens': 512,
    'seconds': 100.4,
  },
  {
    'stage': 2, 'target': 800_000, 'params': 799_679, 'num_heads': [8] * 4, 'num_kv_heads': [4, 4, 4, 2],
    'ffn': [96, 90, 78, 70], 'perplexity_pruned': 42.25, 'perplexity_recovered': 32.5, 'tokens': 1024,
    'seconds': 200.8,
  },
]  # fmt: skip


def make_report() -> dict[str, Any]:
  budget = {'dense': 1_000_000, 'asked': 800_000, 'reached': 799_679}
  return {
    'model': {
      'source': 'data/a<i>&"c".gguf', 'params_before': 1_000_000, 'params_after': 799_679,
      'num_kv_heads': [4] * 4, 'ffn': [96] * 4,
    },
    'perplexity': {'dense': 28.75, 'pruned': 42.25, 'recovered': 32.5, 'definition': 'exp of <the mean>'},
    'schedule': {'targets': [900_000, 800_000], 'tokens_per_step': 128, 'train_steps': 12},
    'stages': copy.deepcopy(STAGES), 'texts': {},
    'budget': {'kind': 'params', 'unit': 'parameters'} | budget,
    'prune': {'method': 'adapt', 'layer_distance': 'cosine'},
    'compiles': {'scoring': 1, 'training': 2, 'evaluation': 3}, 'seconds': 345.6,
    'versions': {'python': '3.11.7', 'jax': '0.10.2'},
  }  # fmt: skip


def make_events() -> list[dict[str, Any]]:
  dense = {'event': 'evaluate', 'of': 'dense', 'stage': 0, 'step': 0, 'perplexity': 28.75}
  events: list[dict[str, Any]] = [dense]
  for row, steps in zip(STAGES, (range(1, 5), range(5, 13)), strict=True):
    stage = {'stage': row['stage']}
    importance = {'loss': 3.5, 'layer_importance': [-0.001, -0.95, -0.92, -0.99], 'sparsity': [0.1] * 4}
    widths = {'params': row['params'], 'kv_groups': row['num_kv_heads'], 'ffn': row['ffn']}
    for step in (2 * row['stage'] - 1, 2 * row['stage']):
      events.append({'event': 'prune', 'step': step} | stage | importance | widths)
    events.append(dense | stage | {'of': 'pruned', 'perplexity': row['perplexity_pruned']})
    for step in steps:
      trained = {'loss': 3.0 + 1 / step, 'tokens_per_second': 64.0, 'learning_rate': 1e-4 * step}
      events.append({'event': 'train', 'step': step} | stage | trained)
    events.append(dense | stage | {'of': 'recovered', 'perplexity': row['perplexity_recovered']})
  return events


def partial_page() -> str:
  """Stage 1 is pruned, not yet recovered."""
  report = make_report()
  row = {k: STAGES[0][k] for k in ('stage', 'target', 'params', 'perplexity_pruned', 'seconds')}
  report |= {'perplexity': {'dense': 28.75, 'definition': None}, 'stages': [row]}
  return render(report, make_events()[:4], command=COMMAND, running=True)


def first_page() -> str:
  """Before the first event."""
  report = make_report() | {'perplexity': {'definition': None}, 'stages': []}
  return render(report, [], command=COMMAND, running=True)


def overflowing_page() -> str:
  """Figures that are not finite, as a pruning that goes too far gives them."""
  report, events = make_report(), make_events()
  report['perplexity']['pruned'] = report['stages'][1]['perplexity_pruned'] = math.inf
  events[3]['perplexity'], events[1]['layer_importance'][1] = math.inf, math.nan
  return render(report, events, command=COMMAND, running=False)


def texts(page: str) -> list[str]:
  """The texts of a page, which is well-formed XML too."""
  return [
    text for element in ElementTree.fromstring(page).iter() for text in (element.text, element.tail) if text
  ]


def rows(page: str) -> list[list[str]]:
  return [[cell.text or '' for cell in row] for row in ElementTree.fromstring(page).iter('tr')]


@pytest.mark.parametrize('make', [partial_page, first_page, overflowing_page])
def test_a_page_needs_nothing_else_and_escapes_what_the_user_wrote(make) -> None:
  page = make()
  assert COMMAND in ''.join(texts(page)) and '<i>' not in page and not re.search(r'@import|url\((?!#)', page)
  for element in ElementTree.fromstring(page).iter():
    tag = element.tag.rpartition('}')[2]
    assert tag not in ('script', 'link', 'img', 'iframe', 'object', 'foreignObject')
    for name, value in element.attrib.items():
      assert not name.startswith('on') and not re.search(r'\b(?:nan|inf)\b', value.lower())
      linked = name.rpartition('}')[2] in ('src', 'href')
      assert not linked or value.startswith(('#', 'data:image/png')), value


def test_a_complete_page_has_every_figure() -> None:
  report = make_report() | {
    'prune': {'method': 'adapt', 'layer_distance': 'cosine', 'calibration': {'source': ['a.txt', 'b.txt']}},
    'exports': {'hf': {'bytes': 12_345_678, 'type': 'bfloat16', 'logit_difference': 0.25, 'same_token': 1.0}},
    'gain': {
      'dense': {'weights': 2_000_000, 'kv_cache': 1024, 'prefill': 1000.0, 'decode': 40.0},
      'result': {'weights': 1_599_358, 'kv_cache': 960, 'prefill': 1200.4, 'decode': 50.0},
      'dtype': 'bfloat16',
      'measured': 'Speeds: in turn.',
    },
    'texts': {'web': {'dense': 28.75, 'pruned': 42.25, 'recovered': 32.5, 'kl': 0.25}},
    'health': {
      'answers': 40,
      'dense': {'repetition': 0.05, 'usable': 27},
      'result': {'repetition': 0.125, 'usable': 21},
      'examples': [{'text': 'question', 'prompt': 'Who <b>?', 'dense': 'Ann.', 'result': 'No & no'}],
    },
  }
  page = render(report, make_events(), command=COMMAND, running=False)
  table, shown = rows(page), '\n'.join(texts(page))
  assert table[:11] == [
    ['', 'dense', 'result', 'change'],
    ['weights in bfloat16, MB', '2.0', '1.6', '-20 %'],
    ['decode, tokens/s', '40.0', '50.0', '+25 %'],
    ['prefill, tokens/s', '1,000', '1,200', '+20 %'],
    ['KV cache, bytes per token', '1,024', '960', '-6 %'],
    ['text', 'perplexity dense', 'pruned', 'recovered', 'loss increase', 'KL from dense'],
    ['web', '28.75', '42.25', '32.50', '0.123', '0.250'],
    ['stage', 'parameters', 'of dense', 'perplexity pruned', 'recovered', 'tokens', 'seconds'],
    ['dense', '1,000,000', '100.0 %', '28.75', '', '', ''],
    ['1', '899,679', '90.0 %', '41.25', '31.50', '512', '100'],
    ['2', '799,679', '80.0 %', '42.25', '32.50', '1,024', '201'],
  ]
  assert ['hf', 'bfloat16', '12.3', '0.25', '100.0%'] in table
  assert ['prune.calibration.source', 'a.txt,b.txt'] in table
  for wanted in (
    'data/a<i>&"c".gguf', 'finished, 2 stages', '28.75 → 42.25 → 32.50', '1,000,000 → 799,679', 'jax 0.10.2',
    'exp of <the mean>', 'Training loss', 'KV heads, after stage 2',
    'Speeds: in turn.', 'Compiles: scoring 1, training 2, evaluation 3.', 'question: Who <b>?', 'No & no',
    'answers, dense → result: usable 27 → 21 of 40; repeating 5 % → 12 %',
    'target 2: 800k', 'Importance of the layers: 1 - cos(input, output)', 'Perplexity on held-out text',
  ):  # fmt: skip
    assert wanted in shown, wanted
  assert 'http-equiv' not in page


def test_a_partial_page_shows_what_is_known() -> None:
  page = partial_page()
  assert rows(page)[2:3] == [['1', '899,679', '90.0 %', '41.25', '–', '–', '100']]
  for wanted in ('running, stage 1 of 2', '1,000,000 → 899,679', 'MLP channels, after stage 1', 'http-equiv'):
    assert wanted in page
  assert 'Training loss' not in page and 'Perplexity on held-out text' not in page  # one point is no curve


def test_a_pruning_that_goes_on_is_no_stage_done_and_shows_what_the_method_decides_by() -> None:
  report, events = make_report(), make_events()
  report |= {'stages': report['stages'][:1], 'prune': {'method': 'obs'}}
  events = [event | {'layer_cost': [1e-9, 2e-9, 3e-9, 5e-7]} for event in events[:10]]
  page = render(report, events, command='', running=True)
  assert 'running, stage 2 of 2: pruning, step 3 done' in page and 'MLP channels, stage 2 so far' in page
  assert 'Median cost per parameter of the groups of a layer' in page


def test_a_running_page_is_drawn_as_often_as_browsers_reload_it(tmp_path: pathlib.Path) -> None:
  """Drawing takes longer than a pruning step of a small model."""
  path, report = tmp_path / 'report.html', make_report()
  write(path, report, [], command='first', running=True)
  write(path, report, [], command='second', running=True)
  assert 'first' in path.read_text()
  os.utime(path, (0, 0))
  write(path, report, [], command='third', running=True)
  assert 'third' in path.read_text()
  write(path, report, [], command='last', running=False)
  assert 'last' in path.read_text() and [p.name for p in tmp_path.iterdir()] == ['report.html']
