"""Mode compare: cells equal lone runs and share work; failures and kills cost only their own cell."""

import csv
import errno
import json
import os
import re
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from adapt_jax.config.build import from_dict
from adapt_jax.configs import ablations, methods_table
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.preemption import Preempted
from adapt_jax.models.errors import InputError
from adapt_jax.modes import cells, compare
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.pruner import Pruner
from tests.support import runs

GRID = ({'prune.method': ('adapt', 'flap'), 'prune.target': (0.8, 0.9)},)
TARGETS = {'prune.target': (0.9, 0.8)}


def make_config(files, grid=GRID, compensate='none', **compare_fields):
  config = runs.make_config(files)
  config.prune.compensate, config.prune.stages = compensate, 1
  config.prune.target = 0.7  # none of the grid's: the names of cells say what differs
  config.compare.grid = grid
  config.compare.update(compare_fields)
  return config


def start(config, path):
  return runs.in_process(config, path, 'compare')


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  """The directory, the report, and how often a scoring program ran and what was evaluated."""
  path, calls = tmp_path_factory.mktemp('finished') / 'out', {'scored': 0, 'evaluated': []}
  compute, perplexity = Pruner._compute, Evaluator.perplexity

  def count_scoring(self, *args):
    calls['scored'] += 1
    return compute(self, *args)

  def count_evaluation(self, config, params, title, **options):
    calls['evaluated'].append(title.split(':')[0])
    return perplexity(self, config, params, title, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Pruner, '_compute', count_scoring)
    patch.setattr(Evaluator, 'perplexity', count_evaluation)
    report = start(make_config(files, compensate='bias'), path)
  return path, report, calls


def cell_report(path, cell):
  return runs.read_report(path / 'cells' / cell['name'])


def scored(path, cell):
  """What each step of a cell was scored on: the method, the step, and the widths before it."""
  lines = (path / 'cells' / cell['name'] / 'metrics.jsonl').read_text().splitlines()
  steps = [e for e in map(json.loads, lines) if e['event'] == 'prune']
  before = ['dense', *(f'{e["kv_groups"]} {e["ffn"]}' for e in steps[:-1])]
  return [(cell['values']['prune.method'], i, x) for i, x in enumerate(before)]


def test_a_cell_is_what_the_run_alone_gives(finished, files, tmp_path):
  """To the bit, though the cell of target 0.8 had most of its scores from that of 0.9."""
  config = make_config(files, grid=(), compensate='bias')
  config.prune.target = 0.8
  config.train.tokens = 0
  alone, cell = tmp_path / 'alone', finished[0] / 'cells' / 'prune.target-0.8'
  lone, mine = runs.in_process(config, alone, 'prune'), runs.read_report(cell)
  assert mine['perplexity'] == lone['perplexity'] and mine['model'] == lone['model']
  plans = [json.loads((path / 'plan.json').read_text())['layers'] for path in (cell, alone)]
  assert plans[0] == plans[1]
  for field in ('--mode=prune', '--config.prune.target=0.8', '--config.prune.method=adapt'):
    assert field in mine['command']


def test_work_is_shared(finished):
  """Steps of a schedule are scored once for all targets, and the dense model is measured once."""
  path, report, calls = finished
  of = {tuple(cell['values'].values()): scored(path, cell) for cell in report['cells']}
  asked = [step for steps in of.values() for step in steps]
  assert calls['scored'] == len(set(asked))
  remembered = len(asked) - len(set(asked))
  assert report['scoring_passes'] == {'computed': len(set(asked)), 'remembered': remembered}
  shared = set(of['adapt', 0.9]) & set(of['adapt', 0.8])  # all but the landing on the larger target
  assert len(shared) > 0.6 * len(of['adapt', 0.9]) > 3 and of['flap', 0.9] == of['flap', 0.8]
  assert report['compiles']['scoring'] == 2  # taylor and fluctuation
  assert calls['evaluated'].count('dense') == 1 and len(calls['evaluated']) == 1 + len(report['cells'])


def test_every_form_says_what_the_cells_say(finished):
  path, report, _ = finished
  rows = list(csv.DictReader((path / 'compare.csv').open()))
  assert len(rows) == len(report['cells']) == 4
  table = (path / 'compare.md').read_text()
  for cell, row in zip(report['cells'], rows, strict=True):
    source = cell_report(path, cell)
    assert cell['params'] == int(row['params']) == source['model']['params_after']
    assert row['version'] == source['versions']['adapt-jax']
    for name in ('dense', 'pruned'):
      assert float(row[f'perplexity_{name}']) == source['perplexity'][name]
    method, target = cell['values']['prune.method'], cell['values']['prune.target']
    assert f'| {method} | {target} | {cell["params"]:,} |' in table
    kept = {p.name for p in (path / 'cells' / cell['name']).iterdir()}
    assert kept - {'.lock'} == {'report.json', 'report.html', 'plan.json', 'metrics.jsonl', 'run.json'}
  page = (path / 'report.html').read_text()
  assert '4 of 4 cells finished' in page and page.count('<svg') == 2
  assert {p.name for p in path.glob('*.svg')} == {'perplexity.svg', 'perplexity-parameters.svg'}


def test_with_recovery_over_stages(files, tmp_path):
  """Fig. 4 of the paper: the same training in one interleave or two."""
  config = make_config(files, ({'prune.stages': (1, 2)},), recover=True)
  config.train.tokens = 8 * 4 * 32
  config.evaluate.source = (f'valid={files / "valid.txt"}', f'train={files / "train.txt"}')
  config.export.formats, config.export.gguf_types = ('gguf', 'hf_padded'), ('Q4_K_M',)  # not for cells
  report = start(config, tmp_path / 'out')
  for cell, count in zip(report['cells'], (1, 2), strict=True):
    source = cell_report(tmp_path / 'out', cell)
    assert len(source['stages']) == count and source['compiles']['training'] == count
    assert cell['texts'] == source['texts'] and {'kl', 'recovered'} <= source['texts']['train'].keys()
    assert '--mode=accel' in source['command']
  drawn = {path.name for path in (tmp_path / 'out').glob('*.svg')}
  assert {f'perplexity{name}.svg' for name in ('', '-train', '-pruned', '-kept')} <= drawn
  assert not list((tmp_path / 'out').rglob('*.safetensors'))


class FakeRun:
  """Writes the report of a run in no time; a cell of target 0.8 raises `error` instead, if there is one."""

  error: BaseException | None = None

  def __init__(self, options, inputs, workdir, command, *, shared, export):
    self._target, self._workdir = options.prune.target, workdir

  def execute(self):
    if self._target == 0.8 and self.error:
      raise self.error
    texts = {'text': {'dense': 10.0, 'pruned': 20.0}}
    report = {'texts': texts, 'tasks': {}, 'compiles': {}, 'seconds': 1.0, 'model': {'params_after': 9}}
    report |= {'perplexity': {'definition': 'exp'}, 'versions': {}}
    self._workdir.report.write_text(json.dumps(report))

  def close(self):
    pass


@pytest.fixture
def fake(monkeypatch):
  monkeypatch.setattr(cells, 'run_class', lambda _: FakeRun)
  monkeypatch.setattr(FakeRun, 'error', None)
  return FakeRun


def test_a_grown_grid_runs_only_what_is_new(fake, files, tmp_path):
  path = tmp_path / 'out'
  start(make_config(files, (TARGETS,)), path)
  before = {p: p.stat().st_mtime_ns for p in (path / 'cells').rglob('*') if p.is_file()}
  start(make_config(files, (TARGETS,)), path)
  report = start(make_config(files, ({'prune.target': (0.9, 0.8, 0.7)},)), path)
  assert [cell['state'] for cell in report['cells']] == 3 * ['finished']
  assert {p: p.stat().st_mtime_ns for p in before} == before


def test_inputs_that_have_changed_since_a_cell_was_finished(fake, files, tmp_path):
  """Otherwise a new cell's perplexity would be compared with another model's, or on another text."""
  config, path = make_config(files, ({'prune.target': (0.9,)},)), tmp_path / 'out'
  text = tmp_path / 'valid.txt'
  shutil.copytree(files / 'model', tmp_path / 'model')
  shutil.copy(files / 'valid.txt', text)
  config.model.source, config.evaluate.source = str(tmp_path / 'model'), (str(text),)
  start(config, path)
  whole = text.read_text()
  text.write_text((files / 'train.txt').read_text())
  start(config, path)  # nothing is left to run
  config.compare.grid = (TARGETS,)
  with pytest.raises(InputError, match=r'evaluate\.source is not what the finished cell .*0\.9'):
    start(config, path)
  text.write_text(whole)
  weights = tmp_path / 'model/model.safetensors'
  save_file({name: 2 * array for name, array in load_file(weights).items()}, weights)
  with pytest.raises(InputError, match=r'model\.source is not what the finished cell .*0\.9'):
    start(config, path)


@pytest.mark.parametrize('error', [FloatingPointError('overflow\nof all'), InputError('x is bad')])
def test_a_failed_cell_is_told_and_tried_again_and_does_not_stop_the_rest(fake, files, tmp_path, error):
  path, config = tmp_path / 'out', make_config(files, (TARGETS | {'seed': (0, 1)},))
  fake.error = error
  with pytest.raises(SystemExit, match='2 of 4 cells failed'):
    start(config, path)
  reason = 'x is bad' if isinstance(error, InputError) else 'FloatingPointError: overflow'
  assert not (path / 'report.json').exists()
  for row in csv.DictReader((path / 'compare.csv').open()):
    failed = row['prune.target'] == '0.8'
    assert (row['state'], row['error']) == (('failed', reason) if failed else ('finished', ''))
    if failed:
      assert (path / 'cells' / row['cell'] / 'error.txt').read_text().splitlines()[0] == reason
      assert f'{row["cell"]}: {reason}' in (path / 'compare.md').read_text()
  fake.error = None
  report = start(config, path)
  assert [c['state'] for c in report['cells']] == 4 * ['finished'] and not list(path.rglob('error.txt'))


@pytest.mark.parametrize(
  'error', [KeyboardInterrupt(), Preempted(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
)
def test_what_stops_the_grid_is_no_failure_of_a_cell_and_it_goes_on_from_there(fake, files, tmp_path, error):
  """On a full disk no other cell could write either, nor this one its error.txt."""
  config, path = make_config(files, (TARGETS,)), tmp_path / 'out'
  fake.error = error
  with pytest.raises(type(error)):
    start(config, path)
  assert not list(tmp_path.rglob('error.txt')) and len(list(path.glob('cells/*/report.json'))) == 1
  fake.error = None
  assert len(start(config, path)['cells']) == 2


@pytest.mark.parametrize('damaged', ['', '{"texts": {"text": {"dense": "many"}}}'])
def test_a_damaged_cell_is_one_line(fake, files, tmp_path, damaged):
  config, path = make_config(files, (TARGETS,)), tmp_path / 'out'
  start(config, path)
  file = path / 'cells/prune.target-0.8/report.json'
  file.write_text(damaged)
  with pytest.raises(InputError, match=re.escape(str(file))):
    start(config, path)
  shutil.rmtree(file.parent)
  assert len(start(config, path)['cells']) == 2


NINE = {'prune.target': (0.9,)}
BAD = [
  ((), {}, 'compare.grid is empty'),
  ((NINE | {'prune.targt': (0.9,)},), {}, "'prune.targt', which is no option"),
  ((NINE | {'model.source': ('a', 'b')},), {}, "'model.source'"),
  ((NINE | {'train.lr': (0.1,)},), {}, 'changes nothing in a cell'),
  (({'prune.target': (0.9, 'much')},), {}, 'prune.target=much: prune.target'),
  (({'prune.target': (0.9, 0.05)},), {}, 'prune.target=0.05: prune.target = 0.05 asks for'),
  ((NINE | {'evaluate.source': ('absent.txt',)},), {}, 'absent.txt: evaluate.source'),
  ((NINE,), {'train.tokens': 0, 'compare.recover': True}, 'train.tokens = 0'),
]


@pytest.mark.parametrize('grid, fields, words', BAD, ids=lambda x: str(x)[:50])
def test_bad_grids_are_refused_before_any_cell_runs(files, tmp_path, grid, fields, words):
  config = make_config(files, grid)
  config.update_from_flattened_dict(fields)
  with pytest.raises(InputError, match=re.escape(words)):
    start(config, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['amplitude', 'distance', 'calibration', 'interleave', 'methods_table'])
def test_recipes(tmp_path, name):
  config = methods_table.get_config() if name == 'methods_table' else ablations.get_config(name)
  cells = compare.list_cells(from_dict(config.to_dict()), Workdir(str(tmp_path), {}))
  assert {cell.options.train.tokens > 0 for cell in cells} == {name == 'interleave'}
  for field in {field for part in config.compare.grid for field in part}:
    assert len({str(cell.cell.values[field]) for cell in cells}) > 1
