"""Mode compare: cells equal lone runs and share work; failures and kills cost only their own cell."""

import copy
import csv
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import statistics
import time
from xml.etree import ElementTree

import pytest
from safetensors.numpy import load_file, save_file

from adapt_jax.config.build import from_dict
from adapt_jax.configs import ablations, methods_table
from adapt_jax.evaluation.perplexity import Evaluator
from adapt_jax.machine.preemption import Preempted
from adapt_jax.models.errors import InputError
from adapt_jax.modes import accel, compare, compare_grid, compare_page, compare_tables
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline import run as run_module
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.pruner import Pruner
from tests.support import runs
from tests.support.starter import Starter

GRID = (
  {'prune.method': ('adapt',), 'prune.target': (0.8, 0.9), 'seed': (0, 1)},
  {'prune.method': ('flap',), 'prune.target': (0.9, 0.8)},
)
SMALL = ({'prune.method': ('flap', 'shortgpt'), 'prune.target': (0.9, 0.8)},)


def make_config(files, grid=GRID, compensate='none', **compare_fields):
  config = runs.make_config(files)
  config.prune.compensate = compensate
  config.prune.stages = 1
  config.prune.target = 0.7  # none of the grid's: the names of cells say what differs
  config.compare.grid = grid
  config.compare.update(compare_fields)
  return config


def start(config, path):
  options = from_dict(config.to_dict())
  workdir = Workdir(str(path), MODES['compare'].identity(options))
  workdir.check()
  compare.run(options, workdir, 'python main.py <x>')
  return json.loads((path / 'report.json').read_text())


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory):
  """The directory, the report, and how often a scoring program ran and what was evaluated."""
  path, calls = tmp_path_factory.mktemp('finished') / 'out', {'scored': 0, 'evaluated': []}
  compute, perplexity = Pruner._compute, Evaluator.perplexity

  def count_scoring(self, *args):
    calls['scored'] += 1
    return compute(self, *args)

  def count_evaluation(self, config, params, title):
    calls['evaluated'].append(title.split(':')[0])
    return perplexity(self, config, params, title)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Pruner, '_compute', count_scoring)
    patch.setattr(Evaluator, 'perplexity', count_evaluation)
    report = start(make_config(files, compensate='bias'), path)
  return path, report, calls


def cell_report(path, cell):
  return json.loads((path / 'cells' / cell['name'] / 'report.json').read_text())


def scored(path, cell):
  """What each step of a cell was scored on: method, seed, and the widths before the step."""
  lines = (path / 'cells' / cell['name'] / 'metrics.jsonl').read_text().splitlines()
  steps = [e for e in map(json.loads, lines) if e['event'] == 'prune']
  before = ['dense', *(f'{e["kv_groups"]} {e["ffn"]}' for e in steps[:-1])]
  return [(cell['values']['prune.method'], cell['values']['seed'], i, x) for i, x in enumerate(before)]


def test_a_cell_is_what_the_run_alone_gives(finished, files, tmp_path):
  """To the bit, though the cell of target 0.8 had most of its scores from that of 0.9."""
  path, report, _ = finished
  config = make_config(files, grid=(), compensate='bias')
  config.seed, config.prune.target = 1, 0.8
  options = from_dict(config.to_dict())
  options = dataclasses.replace(options, train=dataclasses.replace(options.train, tokens=0))
  alone = Workdir(str(tmp_path / 'alone'), {})
  accel.run(options, alone, '')
  cell = path / 'cells' / 'prune.target-0.8_seed-1'
  lone, mine = json.loads(alone.report.read_text()), json.loads((cell / 'report.json').read_text())
  assert mine['perplexity'] == lone['perplexity'] and mine['model'] == lone['model']
  assert (
    json.loads((cell / 'plan.json').read_text())['layers'] == json.loads(alone.plan.read_text())['layers']
  )
  for field in ('--mode=prune', '--config.prune.target=0.8', '--config.seed=1'):
    assert field in mine['command']


def test_steps_of_a_schedule_are_scored_once_for_all_targets(finished):
  path, report, calls = finished
  of = {tuple(cell['values'].values()): scored(path, cell) for cell in report['cells']}
  asked = [step for steps in of.values() for step in steps]
  assert calls['scored'] == len(set(asked))
  remembered = len(asked) - len(set(asked))
  assert report['scoring_passes'] == {'computed': len(set(asked)), 'remembered': remembered}
  for seed in (0, 1):  # all but the landing on the larger target
    shared = set(of['adapt', 0.9, seed]) & set(of['adapt', 0.8, seed])
    assert len(shared) > 0.6 * len(of['adapt', 0.9, seed]) > 3
  assert of['flap', 0.9, 0] == of['flap', 0.8, 0]


def test_one_compile_for_each_way_of_scoring_and_one_evaluation_of_the_dense_model(finished):
  path, report, calls = finished
  assert report['compiles']['scoring'] == 2  # taylor and fluctuation
  assert sum(cell_report(path, cell)['compiles']['scoring'] for cell in report['cells']) == 2
  assert calls['evaluated'].count('dense') == 1 and len(calls['evaluated']) == 1 + len(report['cells'])
  assert report['compiles']['evaluation'] <= len(calls['evaluated'])


def test_every_form_says_what_the_cells_say(finished):
  path, report, _ = finished
  assert json.loads((path / 'compare.json').read_text()) == report
  rows = list(csv.DictReader((path / 'compare.csv').open()))
  assert len(rows) == len(report['cells']) == 6
  for cell, row in zip(report['cells'], rows, strict=True):
    source = cell_report(path, cell)
    assert cell['params'] == int(row['params']) == source['model']['params_after']
    for name in ('dense', 'pruned'):
      assert cell[f'perplexity_{name}'] == float(row[f'perplexity_{name}']) == source['perplexity'][name]
    assert row['prune.method'] == cell['values']['prune.method'] and row['state'] == 'finished'
  text = (path / 'compare.md').read_text()
  for method, target, cells in (('adapt', 0.8, 2), ('flap', 0.9, 1)):
    mine = [c for c in report['cells'] if list(c['values'].values())[:2] == [method, target]]
    found = [c['perplexity_pruned'] for c in mine]
    shown = f'{statistics.median(found):,.2f}'
    if cells > 1:
      shown += f' ({min(found):,.2f}–{max(found):,.2f})'
    line = next(x for x in text.splitlines() if x.startswith(f'| {method} | {target} | '))
    assert len(mine) == cells and f'| {shown} |' in line and f'| {mine[0]["params"]:,} |' in line
    pivot = next(x for x in text.splitlines() if x.startswith(f'| {method} | ') and x != line)
    assert f'| {shown} |' in pivot
  assert 'median (lowest–highest)' in text and 'python main.py <x>' in text


def test_page_and_plots(finished):
  path, report, _ = finished
  page = (path / 'report.html').read_text()
  assert 'http-equiv="refresh"' not in page and 'python main.py &lt;x&gt;' in page
  assert '6 of 6 cells finished' in page and 'cells/prune.target-0.8_seed-1/report.html' in page
  for name in ('perplexity.svg', 'perplexity-parameters.svg'):
    svg = ElementTree.fromstring((path / name).read_text())
    space = '{http://www.w3.org/2000/svg}'
    assert svg.tag == f'{space}svg' and svg.find(f'{space}style') is not None
    paths = [x for x in svg.iter(f'{space}path') if 'line' in x.attrib['class']]
    dots = [x for x in svg.iter(f'{space}circle')]
    ranges = [x for x in svg.iter(f'{space}line') if 'range' in x.attrib['class']]
    assert len(paths) == 2 and len(dots) == 4 and len(ranges) == 2  # two methods, two targets, seeds of one


def test_a_finished_cell_keeps_its_reports_only(finished):
  path, report, _ = finished
  for cell in report['cells']:
    kept = {p.name for p in (path / 'cells' / cell['name']).iterdir()}
    assert kept == {'report.json', 'report.html', 'plan.json', 'metrics.jsonl', 'run.json'}


def test_a_finished_grid_runs_nothing_again_and_a_grown_one_only_what_is_new(finished, files, tmp_path):
  path = tmp_path / 'out'
  start(make_config(files, SMALL), path)
  before = {p: p.stat().st_mtime_ns for p in (path / 'cells').rglob('*') if p.is_file()}
  start(make_config(files, SMALL), path)
  more = ({'prune.method': ('shortgpt', 'flap'), 'prune.target': (0.9, 0.8, 0.7)},)
  report = start(make_config(files, more), path)
  assert [cell['state'] for cell in report['cells']] == 6 * ['finished']
  assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_text_that_has_changed_since_a_cell_was_finished(files, tmp_path):
  """Otherwise a new cell's perplexity would be compared with the dense model's on the old text."""
  config, path = make_config(files, ({'prune.method': ('flap',), 'prune.target': (0.9,)},)), tmp_path / 'out'
  text = tmp_path / 'valid.txt'
  text.write_text((files / 'valid.txt').read_text())
  config.evaluate.source = (str(text),)
  start(config, path)
  text.write_text((files / 'train.txt').read_text())
  start(config, path)  # nothing is left to run
  for more in ({'prune.target': (0.9, 0.8)}, {'prune.target': (0.9,), 'seed': (0, 1)}):
    config.compare.grid = ({'prune.method': ('flap',)} | more,)
    with pytest.raises(InputError, match=r'evaluate\.source is not what the finished cell .*0\.9'):
      start(config, path)
  assert not (path / 'cells').joinpath('prune.method-flap_prune.target-0.8').exists()


def test_a_model_that_has_changed_since_a_cell_was_finished(files, tmp_path):
  config, path = make_config(files, ({'prune.target': (0.9,)},)), tmp_path / 'out'
  shutil.copytree(files / 'model', tmp_path / 'model')
  config.model.source = str(tmp_path / 'model')
  start(config, path)
  weights = tmp_path / 'model/model.safetensors'
  save_file({name: 2 * array for name, array in load_file(weights).items()}, weights)
  for more in ({'prune.target': (0.8,)}, {'prune.target': (0.8,), 'model.dtype': ('bfloat16',)}):
    config.compare.grid = ({'prune.target': (0.9,)}, more)
    with pytest.raises(InputError, match=r'model\.source is not what the finished cell .*0\.9'):
      start(config, path)


def test_exports_of_a_recipe_are_not_for_cells(files, tmp_path):
  """Cells write no weights, so the model may be one that the formats cannot hold."""
  config = make_config(files, ({'prune.target': (0.9,)},))
  config.export.formats, config.export.gguf_types = ('gguf', 'hf_padded'), ('Q4_K_M',)
  config.prune.compensate = 'bias'  # no stock class has it
  report = start(config, tmp_path / 'out')
  assert [cell['state'] for cell in report['cells']] == ['finished']


def test_cells_that_measure_several_texts(files, tmp_path):
  config = make_config(files, SMALL[:1])
  config.evaluate.source = (f'valid={files / "valid.txt"}', f'train={files / "train.txt"}')
  report = start(config, tmp_path / 'out')
  for group, cell in zip(report['groups'], report['cells'], strict=True):
    train = cell['texts']['train']
    assert group['perplexity train'] == 3 * [train['pruned']] and group['kl train'] == 3 * [train['kl']]
    assert group['excess train'][0] == pytest.approx(math.log(train['pruned'] / train['dense']))
  head = (tmp_path / 'out/compare.md').read_text()
  assert '| excess valid | KL valid | excess train | KL train |' in head
  rows = list(csv.DictReader((tmp_path / 'out/compare.csv').open()))
  assert float(rows[0]['kl train']) == report['cells'][0]['texts']['train']['kl']
  assert (tmp_path / 'out/perplexity-train.svg').exists()


def break_cells(patch, error):
  """All cells of target 0.8 fail."""
  whole = run_module.Run._prune_stage

  def fail(self, stage, state):
    if self.options.prune.target == 0.8:
      raise error
    whole(self, stage, state)

  patch.setattr(run_module.Run, '_prune_stage', fail)


@pytest.mark.parametrize('error', [FloatingPointError('overflow\nof all'), InputError('config.x is bad')])
def test_a_failed_cell_is_told_and_tried_again_and_does_not_stop_the_rest(
  files, tmp_path, monkeypatch, error, capsys
):
  path, config = tmp_path / 'out', make_config(files, SMALL)
  with monkeypatch.context() as patch:
    break_cells(patch, error)
    with pytest.raises(SystemExit) as stop:
      start(config, path)
  assert '2 of 4 cells failed' in stop.value.code and '\n' not in stop.value.code
  report = json.loads((path / 'compare.json').read_text())
  reason = 'FloatingPointError: overflow' if isinstance(error, FloatingPointError) else 'config.x is bad'
  states = {c['name']: c['state'] for c in report['cells']}
  assert not (path / 'report.json').exists()
  for name, state in states.items():
    assert state == ('failed' if '0.8' in name else 'finished')
    if state == 'failed':
      assert (path / 'cells' / name / 'error.txt').read_text().splitlines()[0] == reason
      assert f'{name}: {reason}' in (path / 'compare.md').read_text()
  done = path / 'cells' / 'prune.method-flap_prune.target-0.9' / 'report.json'
  before = done.stat().st_mtime_ns
  report = start(config, path)
  assert [c['state'] for c in report['cells']] == 4 * ['finished'] and done.stat().st_mtime_ns == before
  assert not list(path.rglob('error.txt')) and 'failed' not in (path / 'compare.md').read_text()


@pytest.mark.parametrize('error', [KeyboardInterrupt, Preempted])
def test_what_stops_the_grid_is_no_failure_of_a_cell(files, tmp_path, monkeypatch, error):
  break_cells(monkeypatch, error())
  with pytest.raises(error):
    start(make_config(files, SMALL), tmp_path / 'out')
  assert not list(tmp_path.rglob('error.txt'))


def test_a_full_disk_stops_the_grid(files, tmp_path, monkeypatch):
  """No other cell could write either, nor this one its error.txt."""
  break_cells(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
  with pytest.raises(OSError, match='No space left'):
    start(make_config(files, SMALL), tmp_path / 'out')
  assert not list(tmp_path.rglob('error.txt'))


def test_a_killed_grid_goes_on_with_what_is_not_finished(files, tmp_path):
  path = tmp_path / 'out'
  grid = "({'prune.method': ('adapt', 'flap'), 'prune.target': (0.9, 0.8)},)"
  flags = ['--mode=compare', f'--config.compare.grid={grid}', '--config.prune.stages=1']
  flags += ['--config.prune.calibration.samples=8', '--config.prune.compensate=none']  # for all cells
  starter = Starter(tmp_path, files)
  pid, deadline = starter.start(path, *flags), time.monotonic() + 300
  while not list(path.glob('cells/*/report.json')):
    assert os.path.exists(f'/proc/{pid}') and time.monotonic() < deadline
    time.sleep(0.002)
  os.kill(pid, signal.SIGKILL)
  assert starter.wait()[0] == -signal.SIGKILL
  before = {p: p.stat().st_mtime_ns for p in path.glob('cells/*/report.json')}
  assert len(before) < 4 and not (path / 'report.json').exists()
  result = runs.main(files, path, *flags)
  assert result.returncode == 0 and f'{len(before)} of 4 cells are finished' in result.stdout, result.stderr
  assert {p: p.stat().st_mtime_ns for p in before} == before
  assert '| adapt | 0.8 |' in result.stdout and 'compare: 4/' not in result.stdout
  for run in path.glob('cells/*/run.json'):
    assert json.loads(run.read_text())['config']['prune']['calibration']['samples'] == 8


def test_with_recovery_over_stages(files, tmp_path):
  """Fig. 4 of the paper: the same training in one interleave or two."""
  config = make_config(files, ({'prune.stages': (1, 2)},), recover=True, x='prune.stages')
  config.train.tokens = 8 * 4 * 32
  report = start(config, tmp_path / 'out')
  dense = report['model']['params_before']
  for cell, count in zip(report['cells'], (1, 2), strict=True):
    source = cell_report(tmp_path / 'out', cell)
    assert len(source['stages']) == count and source['compiles']['training'] == count
    assert cell['perplexity_recovered'] == source['perplexity']['recovered'] < cell['perplexity_pruned']
    assert '--mode=accel' in source['command']
  text = (tmp_path / 'out' / 'compare.md').read_text()
  assert f'| {report["cells"][1]["perplexity_recovered"]:,.2f} |' in text and '| recovered |' in text
  kept = ElementTree.fromstring((tmp_path / 'out' / 'perplexity-kept.svg').read_text())
  hovers = [x.text for x in kept.iter('{http://www.w3.org/2000/svg}title')]
  assert len(hovers) == 2 and f'{report["cells"][0]["params"] / dense:.1f}' == '0.7'
  assert (tmp_path / 'out' / 'perplexity-pruned.svg').exists()
  assert not list((tmp_path / 'out').rglob('*.safetensors'))


BAD = [
  ((), {}, ('compare.grid is empty',)),
  (({},), {}, ('compare.grid',)),
  (({'prune.target': ()},), {}, ('compare.grid', 'prune.target')),
  (('prune.target',), {}, ('compare.grid', 'list of groups')),
  (({'prune.targt': (0.9,)},), {}, ("'prune.targt'",)),
  (({'prune.target': (0.9,), 'model.source': ('a', 'b')},), {}, ("'model.source'", 'share')),
  (({'prune.target': (0.9,), 'compare.over': ('a',)},), {}, ("'compare.over'",)),
  *(
    (({'prune.target': (0.9,), field: (1, 2)},), {}, (f"'{field}'", 'changes nothing in a cell'))
    for field in ('bench.repeats', 'generate.chat', 'export.formats', 'data.cache', 'sensitivity.sparsity')
  ),
  (({'prune.target': (0.9,), 'train.lr': (0.1,)},), {}, ('train.lr', 'recover = False')),
  (({'prune.target': (0.9, 'much')},), {}, ('cell prune.target=much: prune.target',)),
  (({'prune.target': (0.9, -1)},), {}, ('cell prune.target=-1.0: prune.target',)),
  (
    ({'prune.target': (0.9,), 'prune.method': ('sparsegpt',)},),
    {},
    ('cell ', "prune.method = 'sparsegpt'"),
  ),
  (({'prune.target': (0.9,), 'seed': (0.5,)},), {}, ('seed=0.5: seed',)),
  (({'prune.amplitude': (0.1,)},), {}, ("compare.x = 'prune.target'", 'prune.amplitude')),
  (({'prune.target': (0.9,), 'evaluate.source': ((),)},), {}, ('cell ', 'evaluate.source is empty')),
  (({'prune.target': (0.9,)},), {'over': 'seeds'}, ('compare.over', 'seeds')),
  (({'prune.target': (0.9,)},), {'over': 'prune.target'}, ('compare.over', 'compare.x')),
]


@pytest.mark.parametrize('grid,fields,words', BAD, ids=lambda x: str(x)[:50])
def test_bad_grids(files, tmp_path, grid, fields, words):
  with pytest.raises(InputError) as error:
    start(make_config(files, grid, **fields), tmp_path / 'out')
  assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()
  assert all(word in str(error.value) for word in words), str(error.value)


def test_what_only_the_model_or_the_text_tells_is_refused_before_any_cell_runs(files, tmp_path):
  samples = 2**20
  for grid, words in (
    (({'prune.target': (0.9, 0.05)},), 'cell prune.target=0.05: prune.target = 0.05 asks for'),
    (({'prune.target': (0.9,), 'prune.method': ('adapt', 'llm_pruner')},), 'method=llm_pruner: config.prune'),
    (({'prune.target': (0.9,), 'prune.calibration.samples': (16, samples)},), f'samples={samples}: config'),
    (({'prune.target': (0.9,), 'evaluate.source': ('absent.txt',)},), 'absent.txt: evaluate.source'),
  ):
    with pytest.raises(InputError, match=re.escape(words)):
      start(make_config(files, grid), tmp_path / 'out')
  config = make_config(files)
  config.evaluate.source = ()
  with pytest.raises(InputError, match=r'evaluate\.source is empty'):
    start(config, tmp_path / 'out')
  config = make_config(files, recover=True)
  config.train.tokens = 0
  with pytest.raises(InputError, match=r'train\.tokens = 0'):
    start(config, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_a_bad_grid_on_the_command_line_is_one_line_and_exit_code_2(files, tmp_path):
  grid = "({'prune.target': (0.9, 0.01)},)"
  result = runs.main(files, tmp_path / 'out', '--mode=compare', f'--config.compare.grid={grid}')
  assert result.returncode == 2 and result.stderr.count('\n') == 1
  assert result.stderr.startswith('error: cell prune.target=0.01: ')


@pytest.mark.parametrize('name', ['amplitude', 'distance', 'calibration', 'interleave', 'methods_table'])
def test_recipes(tmp_path, name):
  config = methods_table.get_config() if name == 'methods_table' else ablations.get_config(name)
  cells = compare.list_cells(from_dict(config.to_dict()), Workdir(str(tmp_path), {}))
  assert {cell.options.train.tokens > 0 for cell in cells} == {name == 'interleave'}
  for field in {field for part in config.compare.grid for field in part}:
    found = {str(compare_grid.get(dataclasses.asdict(cell.options), field)) for cell in cells}
    assert len(found) > 1
  with pytest.raises(ValueError, match='amplitude, distance'):
    ablations.get_config('amplitud')


def test_words_and_wide_numbers_stand_evenly_on_the_plot():
  def report(field, values):
    cells = [
      {'name': str(v), 'values': {field: v}, 'state': 'finished', 'params': 10, 'seconds': 1.0}
      | {'perplexity_dense': 2.0, 'perplexity_pruned': 3.0 + i, 'perplexity_recovered': None}
      for i, v in enumerate(values)
    ]
    model = {'source': 'a', 'params_before': 20}
    base = {'model': model, 'fields': [field], 'x': field, 'over': 'seed', 'recover': False, 'cells': cells}
    return compare_tables.with_groups(base)

  for field, values in (('prune.method', ('a', 'b', 'c')), ('prune.calibration.samples', (8, 64, 512))):
    chart = ElementTree.fromstring(compare_page.plots(report(field, values))['perplexity.svg'])
    xs = [float(dot.attrib['cx']) for dot in chart.iter('circle')]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.1)
    assert {str(v) for v in values} <= {text.text for text in chart.iter('text')}


def test_a_broken_model_does_not_flatten_the_plots(finished):
  """It stands at the upper edge, its true figure under the pointer, and the axis says where the plot ends."""
  report = copy.deepcopy(finished[1])
  for cell in report['cells']:
    if cell['values']['prune.method'] == 'flap':
      cell['perplexity_pruned'] = 1e9
  dense = report['cells'][0]['perplexity_dense']
  chart = compare_page.plots(compare_tables.with_groups(report))['perplexity.svg']
  assert f'(up to {20 * dense:,.0f})' in chart and '1e+09' in chart
  heights = {float(y) for y in re.findall(r'<circle class="dot fill1"[^>]* cy="([\d.]+)"', chart)}
  others = {float(y) for y in re.findall(r'<circle class="dot fill0"[^>]* cy="([\d.]+)"', chart)}
  assert len(heights) == 1 and max(heights) < 60 and min(others) > 100
  report = copy.deepcopy(finished[1])
  assert 'up to' not in compare_page.plots(report)['perplexity.svg']
  report['groups'][0]['perplexity'][2] = 1e9  # of the range alone
  assert '(up to' in compare_page.plots(report)['perplexity.svg']
