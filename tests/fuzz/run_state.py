"""What a run leaves on disk and reads again: run.json, its state, its log, token caches, the teacher's files.

The run is one of version 0.1 that was killed (tests/data/workdirs-0.1); its plan gets today's checksum.
"""

import json
import os
import pathlib
import random
import shutil
import tarfile
from typing import Any, NoReturn

import jax
import numpy as np

from adapt_jax.config.build import defaults, flatten, from_dict
from adapt_jax.config.options import DistillOptions, RunOptions, TrainOptions
from adapt_jax.data.token_cache import Need, open_cache
from adapt_jax.machine.compiler import Compiler
from adapt_jax.machine.processes import silent
from adapt_jax.models.files import json_checksum
from adapt_jax.models.formats.source import open_source
from adapt_jax.models.network.backend import made_for
from adapt_jax.modes import export
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline.budgets import budget_of
from adapt_jax.pipeline.dense_model import DenseModel
from adapt_jax.pipeline.metrics import MetricsLog
from adapt_jax.pipeline.run_report import run_report
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pipeline.state import StateStore, array_shapes
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.reports import run_page
from adapt_jax.training.optim import optimizer
from adapt_jax.training.teacher_cache import _checksums, open_taught
from tests.fuzz.cases import Kind, Values, digest
from tests.fuzz.mutations import damage_bytes, damage_file, damage_json, json_text, replace_file
from tests.support.tokenizers_for_tests import tiny_tokenizer

FILES = pathlib.Path(__file__).parents[1] / 'data/workdirs-0.1'
_TOKENIZER = tiny_tokenizer()


def _options(run: pathlib.Path) -> RunOptions:
  """The options of the run, which read the model and the texts beside it."""
  return from_dict(json.loads(run.read_text())['config'])


class _Workdir(Kind):
  """The workdir of the killed run, in the working directory of the case."""

  writes = ('run/report.html', 'run/checkpoints')

  def make(self, place: pathlib.Path) -> None:
    shutil.copytree(FILES / 'model', place / 'model')
    with tarfile.open(FILES / 'pruning.tar.gz') as archive:
      archive.extractall(place, filter='data')
    (place / 'pruning').rename(place / 'run')
    plan = json.loads((place / 'run/plan.json').read_text())
    (place / 'run/plan.json').write_text(json.dumps(plan | {'checksum': json_checksum(plan)}) + '\n')
    (place / 'run/plan.json').chmod(0o644)
    saved = json.loads((place / 'run/run.json').read_text())
    saved |= {'texts': {'train.source': 'a', 'evaluate.source': 'b'}}
    (place / 'run/run.json').write_text(json.dumps(saved, indent=2))
    shutil.copyfile(place / 'run/run.json', place / 'asked.json')

  def warm(self, base: pathlib.Path) -> None:
    with made_for('cpu'):
      open_source(str(base / 'model'))


class RunFile(_Workdir):
  """run.json, which says whose the directory is."""

  name, share = 'run.json', 0.06

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    return damage_file(place / 'run/run.json', rng)

  def observe(self, place: pathlib.Path) -> Values:
    asked = MODES['accel'].identity(_options(place / 'asked.json'))
    workdir = Workdir(str(place / 'run'), asked)
    workdir.check()
    with workdir.claimed(lambda: {'train.source': 'a', 'evaluate.source': 'b'}):
      if not workdir.run.exists():
        raise AssertionError('claimed without run.json')
    saved = json.loads(workdir.run.read_text())
    known = flatten(defaults()) | flatten(saved['config'])
    wanted = flatten(asked['config'])  # 1.0 for 1 is the same option
    ours = {name: wanted[name] if wanted[name] == known[name] else known[name] for name in wanted}
    return {'mode': saved['mode'], 'options': json.dumps(ours, sort_keys=True)}


class SavedState(_Workdir):
  """The newest checkpoint, the plan and the log, which a resumed run reads."""

  name, share = 'state', 0.05
  writes = ('run/report.html', 'run/metrics.jsonl')

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    files = [
      path for path in sorted((place / 'run').rglob('*')) if path.is_file() and path.name != 'run.json'
    ]
    path = rng.choice(rng.choice([files, [place / 'run/plan.json'], [place / 'run/metrics.jsonl']]))
    if path.name == 'metrics.jsonl' and rng.random() < 0.6:
      return _damage_rows(path, rng)
    if path.name == 'plan.json' and rng.random() < 0.5:
      return _damage_plan(path, rng)
    return damage_file(path, rng)

  def observe(self, place: pathlib.Path) -> Values:
    os.chdir(place)
    options = _options(place / 'asked.json')
    source = open_source(options.model.source)
    model = DenseModel(source)
    budget = budget_of(options, source.config, source.dtype)
    tx = optimizer(options.train, Schedule.of(options, budget).train_steps)
    workdir = Workdir('run', MODES['accel'].identity(options))
    log = MetricsLog(workdir.metrics)
    store = StateStore(workdir, model.config, log)
    state = store.resume(lambda plan: array_shapes(model, plan, tx), dict)
    report, rows = run_report(options, model, budget, state), log.read()
    run_page.write(workdir.page, report, rows, command='', running=True)
    store.close()
    found = {'plan': json.dumps(state.pruning.to_json()), 'report': json.dumps(report, sort_keys=True)}
    arrays = jax.tree_util.tree_leaves_with_path(state.arrays)
    found['arrays'] = digest(*[part for path, x in arrays for part in (str(path), np.asarray(x).tobytes())])
    found['step'] = f'{state.stage} {state.train_step} {state.complete}'
    return found | {'log': json.dumps(rows)}

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """The log has no checksum and is only drawn; a plan that is gone is made again from the checkpoint."""
    found = {}
    if _content(place / 'run/metrics.jsonl') != _content(base / 'run/metrics.jsonl'):
      found['log'] = ''
    plan = json.loads(_content(place / 'run/plan.json') or b'{}')
    if plan.pop('checksum', None) in (None, json_checksum(plan)):  # of version 0.1, or edited with care
      found |= {'plan': '', 'report': '', 'log': ''}
    return found


class Unfinished(_Workdir):
  """A run that was killed, as mode export reads it."""

  name, share = 'unfinished', 0.04

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    files = [path for path in sorted((place / 'run/checkpoints').rglob('*')) if path.is_file()]
    return damage_file(rng.choice([place / 'run/run.json', place / 'run/run.json', rng.choice(files)]), rng)

  def observe(self, place: pathlib.Path) -> Values:
    os.chdir(place)
    model = export._from_checkpoint(pathlib.Path('run'))
    params = model.load(False)
    arrays = jax.tree_util.tree_leaves_with_path(params)
    found = {'arrays': digest(*[part for path, x in arrays for part in (str(path), np.asarray(x).tobytes())])}
    found |= {'config': repr(model.config), 'template': model.chat_template, 'trained': str(model.trained)}
    return found | {'report': json.dumps(model.report, sort_keys=True)}

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """run.json has no checksum: the report of the model says what it says."""
    same = _content(place / 'run/run.json') == _content(base / 'run/run.json')
    return {} if same else {'report': '', 'template': ''}


class Tokens(Kind):
  """A cache of tokens; a damaged one is made again."""

  name, share, writes = 'tokens', 0.06, ('cache/*',)

  def make(self, place: pathlib.Path) -> None:
    self._open(place)

  def _open(self, place: pathlib.Path) -> Any:
    fields = {'text_field': 'text', 'messages_field': 'messages', 'field': 'train.source'}
    with silent():
      return open_cache(place / 'cache', str(FILES / 'valid.txt'), _TOKENIZER, Need(2000), **fields)

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    caches = [path for path in sorted((place / 'cache').iterdir()) if path.is_dir()]
    if rng.random() < 0.1:
      caches[0].rename(
        caches[0].with_name(rng.choice([caches[0].name[:-1], f'{caches[0].name}9', 'x-²', 'x']))
      )
      return 'named differently'
    return damage_file(rng.choice(sorted(caches[0].iterdir())), rng)

  def observe(self, place: pathlib.Path) -> Values:
    found = self._open(place)
    values = {name: digest(getattr(found, name)[:2000].tobytes()) for name in ('tokens', 'flags')}
    return values | {'enough': str(len(found.tokens) >= 2000), 'highest': repr(found.highest)}


class TeacherFiles(Kind):
  """The teacher's predictions."""

  name, share = 'teacher', 0.03

  def make(self, place: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    np.save(place / 'ids.npy', rng.integers(0, 300, (6, 8, 4)).astype(np.uint16))
    np.save(place / 'log_p.npy', rng.standard_normal((6, 8, 5)).astype(np.float16))
    np.save(place / 'check.npy', _checksums(*_Rows().read(np.arange(6))))
    (place / 'done').write_text('6')

  def damage(self, place: pathlib.Path, rng: random.Random) -> str:
    path = rng.choice(sorted(place.iterdir()))
    if rng.random() < 0.1:
      return replace_file(path, rng)
    path.write_bytes(damage_bytes(path.read_bytes(), rng, rng.choice([128, None])))
    return f'{path.name}: bytes'

  def observe(self, place: pathlib.Path) -> Values:
    options = TrainOptions(length=8, distill=DistillOptions(cache=4))
    try:
      taught = open_taught(place, _Rows(), options, 1, _ask_again, dtype=np.float32, compiler=Compiler())
    except _AskedError:
      return {'done': 'no'}
    found = taught.read(np.arange(6))
    return {'done': 'yes'} | {str(i): digest(x.shape, np.asarray(x).tobytes()) for i, x in enumerate(found)}

  def harmless(self, place: pathlib.Path, base: pathlib.Path) -> dict[str, str]:
    """Predictions have no checksum, only the rows that they are of."""
    found = {str(i): '' for i, name in ((3, 'ids'), (4, 'log_p')) if _differ(place, base, f'{name}.npy')}
    return found | (dict.fromkeys(['done', *map(str, range(5))], '') if _differ(place, base, 'done') else {})


class _AskedError(Exception):
  """The teacher would be asked again."""


def _ask_again() -> NoReturn:
  raise _AskedError


class _Rows:
  """A train set of six rows."""

  def rows(self, step: int) -> np.ndarray:
    return np.arange(6)

  def read(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    tokens = np.arange(48, dtype=np.int32).reshape(6, 8)[rows]
    return tokens, tokens > 0, np.ones_like(tokens)


def _content(path: pathlib.Path) -> bytes | None:
  return path.read_bytes() if path.is_file() else None


def _differ(place: pathlib.Path, base: pathlib.Path, name: str) -> bool:
  return _content(place / name) != _content(base / name)


def _damage_rows(path: pathlib.Path, rng: random.Random) -> str:
  rows = damage_json([json.loads(line) for line in path.read_text().splitlines()], rng)
  path.write_text('\n'.join(map(json_text, rows)) + '\n' if isinstance(rows, list) else json_text(rows))
  return 'metrics.jsonl: rows'


def _damage_plan(path: pathlib.Path, rng: random.Random) -> str:
  """Other values, with a checksum that fits them, or none, as in version 0.1."""
  plan = json.loads(path.read_text())
  del plan['checksum']
  plan = damage_json(plan, rng)
  if isinstance(plan, dict) and rng.random() < 0.5:
    plan['checksum'] = json_checksum(json.loads(json_text(plan))) if 'deep' not in repr(plan) else 0
  path.write_text(json_text(plan))
  return 'plan.json: values with a checksum'


KINDS = (RunFile(), SavedState(), Unfinished(), Tokens(), TeacherFiles())
