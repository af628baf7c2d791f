"""A tiny model, its text and its config, for tests that run the whole job."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from adapt_jax.config.build import from_dict
from adapt_jax.configs import base
from adapt_jax.export.hf import write_hf
from adapt_jax.models.config import LayerShape, ModelConfig, RopeConfig
from adapt_jax.models.errors import InputError
from adapt_jax.modes.registry import MODES
from adapt_jax.pipeline import gain
from adapt_jax.pipeline.stages import Recovery
from adapt_jax.pipeline.state import StateStore
from adapt_jax.pipeline.workdir import Workdir
from adapt_jax.pruning.serving_widths import aligned
from adapt_jax.reports import charts
from adapt_jax.training.loop import Trained
from tests.support import forks, programs
from tests.support.helpers import new_params
from tests.support.tokenizers_for_tests import tiny_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
HIDDEN = 32
LAYERS = 2
TOKENS = 8 * 4 * 32
TWO_STAGES = ('--config.prune.stages=2', f'--config.train.tokens={2 * TOKENS}', '--config.train.save_every=3')
_LINE = 'the union stands while its people hold fast to the law and to each other in every season of need'
_WORDS = _LINE.split()


def make_files(path: pathlib.Path) -> pathlib.Path:
  """model/ and bfloat16/ (the same weights), train.txt, valid.txt under `path`; returns it."""
  tokenizer = tiny_tokenizer()
  shapes = (LayerShape(6, 3, 48),) * LAYERS
  config = ModelConfig('llama', len(tokenizer), HIDDEN, 8, shapes, RopeConfig(1e4), 1e-5, True)
  params = new_params(config)
  write_hf(config, params, path / 'model', tokenizer=tokenizer)
  write_hf(config, params, path / 'bfloat16', tokenizer=tokenizer, dtype=jax.numpy.bfloat16)
  rng = np.random.default_rng(0)
  for name, sentences in (('train', 3000), ('valid', 20)):
    starts = rng.integers(0, len(_WORDS), sentences)
    text = '\n'.join(' '.join(np.roll(_WORDS, -s)[:9]) + '.' for s in starts)
    (path / f'{name}.txt').write_text(text)
  return path


def in_two_stages(config: ConfigDict) -> ConfigDict:
  """The same with twice as many steps, halved between two stages, and checkpoints in both."""
  config.prune.stages = 2
  config.train.tokens = 2 * TOKENS
  config.train.save_every = 3
  return config


def make_config(files: pathlib.Path) -> ConfigDict:
  """One stage to 80 %, eight training steps, one checkpoint in the midst of them."""
  config = base.get_config()
  config.model.source = str(files / 'model')
  config.prune.method = 'adapt'
  config.prune.target = 0.8
  config.prune.stages = 1
  config.prune.steps = 40
  config.prune.heal, config.prune.align_ffn = 0, 1  # small MLPs would hardly be pruned in blocks of 32
  config.prune.calibration.source = (str(files / 'train.txt'),)
  config.prune.calibration.samples = 16
  config.prune.calibration.length = 16
  config.prune.calibration.own = 0.0
  config.data.cache = str(files / 'cache')
  config.train.source = (str(files / 'train.txt'),)
  config.train.tokens = TOKENS
  config.train.batch = 4
  config.train.micro_batch = 4
  config.train.length = 32
  config.train.dtype = 'float32'  # not as a product of this machine takes
  config.train.lr = 1e-2
  config.train.min_lr = 1e-3
  config.train.save_every = 5
  config.train.distill.alpha = 0.0  # a random model teaches nothing; its text does
  config.evaluate.source = (str(files / 'valid.txt'),)
  config.evaluate.length = 32
  config.evaluate.health = False  # 40 answers take longer than the rest
  return config


def command(files: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[str]:
  """`python main.py` with the config of `make_config`."""
  recipe = files / 'recipe.py'
  if not recipe.exists():
    recipe.write_text(f"""
import pathlib
from tests.support import runs
def get_config():
  return runs.make_config(pathlib.Path({str(files)!r}))
""")
  return [sys.executable, str(ROOT / 'main.py'), f'--config={recipe}', f'--workdir={workdir}', *flags]


def main(files: pathlib.Path, workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
  """Runs `main.py` to its end, in a process forked from one that has imported it."""
  return forks.main(command(files, workdir, *flags)[1:])


def in_process(
  config: ConfigDict,
  path: pathlib.Path,
  mode: str = 'accel',
  command: str = 'python main.py',
  whole: bool = False,
) -> dict[str, Any]:
  """The report of a mode that has a workdir, run in this process.

  whole: whether it measures speeds and draws charts; they take a third of the time of a tiny run.
  """
  options = aligned(MODES[mode].settle(from_dict(config.to_dict())))
  workdir = Workdir(str(path), MODES[mode].identity(options))
  workdir.check()
  with programs.traced_once(), pytest.MonkeyPatch.context() as patch:
    if not whole:
      patch.setattr(gain, '_LARGEST', 0)
      patch.setattr(charts, '_svg', lambda title, *_: f'<svg>{title}</svg>')
    MODES[mode].run(options, workdir, command)
  return read_report(path)


def read_report(path: pathlib.Path) -> dict[str, Any]:
  report: dict[str, Any] = json.loads((path / 'report.json').read_text())
  return report


def events(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a run's log."""
  return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def assert_same_end(path: pathlib.Path, reference: pathlib.Path) -> None:
  """Two finished runs have the same weights, figures, log and plan; times aside."""
  for name in ('hf/model.safetensors', 'hf/config.json', 'hf/tokenizer.json'):
    assert (path / name).read_bytes() == (reference / name).read_bytes(), name
  ours, theirs = map(read_report, (path, reference))
  for report in (ours, theirs):
    for stage in report['stages']:
      del stage['seconds']
  assert all(ours[name] == theirs[name] for name in ('stages', 'perplexity', 'texts'))
  logs = [[row for row in events(p) if row['event'] != 'gain'] for p in (path, reference)]  # it has speeds
  for row in logs[0] + logs[1]:
    assert row.pop('tokens_per_second', 1) > 0 and row.pop('time')
  assert logs[0] == logs[1]
  plans = [json.loads((p / 'plan.json').read_text()) for p in (path, reference)]
  assert plans[0] == plans[1]


def keep_checkpoints(patch: pytest.MonkeyPatch) -> None:
  """Later runs in this process keep them at the end, for tests that take the end away."""
  patch.setattr(StateStore, 'finish', lambda self, exported: None)


def steps_of(patch: pytest.MonkeyPatch, last: int | None = None) -> list[int]:
  """A list that gets the training steps of later runs in this process; they fail after step `last`."""
  taken: list[int] = []
  train = Recovery.steps

  def steps(self: Recovery, *args: Any) -> Iterator[Trained]:
    for done in train(self, *args):
      taken.append(done.step)
      yield done
      if done.step == last:
        raise InputError('killed')

  patch.setattr(Recovery, 'steps', steps)
  return taken
