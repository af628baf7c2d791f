"""A run that takes hours says so at its start, and a short one does not."""

import dataclasses
import types

import numpy as np
import pytest

from adapt_jax.config.build import choices, from_dict
from adapt_jax.pipeline import flops, forecast
from adapt_jax.pipeline.run import Run
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.pruning import budget
from adapt_jax.pruning.narrow import narrowed_config
from adapt_jax.training.loop import Trained
from tests.support.helpers import tiny_config

CONFIG = tiny_config()


def run(tokens: int = 0, alpha: float = 0.0, **prune: object):
  options = from_dict(
    {
      'prune': {'calibration': {'samples': 4, 'length': 8}} | prune,
      'train': {'tokens': tokens, 'batch': 2, 'length': 16, 'distill': {'alpha': alpha}},
    }
  )
  small = narrowed_config(CONFIG, options.prune.hidden)
  limit = dataclasses.replace(budget.params(small), dense=budget.params(CONFIG).dense)
  inputs = types.SimpleNamespace(
    config=small,
    source=types.SimpleNamespace(config=CONFIG),
    evaluate={'text': types.SimpleNamespace(tokens=np.zeros((3, 16)))},
    train='rows' if tokens else None,
    dtype=np.float32,
    budget=limit,
  )
  return options, inputs


def test_training_counts_the_pruned_model_and_its_teacher() -> None:
  forward = flops.forward(CONFIG, 16)
  more = forecast.operations(*run(64_000, target=0.5)) - forecast.operations(*run(32_000, target=0.5))
  assert more == pytest.approx(32_000 * 3 * forward / 2, rel=1e-3)
  taught = forecast.operations(*run(64_000, alpha=1.0, target=0.5))
  assert taught - forecast.operations(*run(64_000, target=0.5)) == pytest.approx(64_000 * forward)


def test_progressive_methods_score_at_every_step() -> None:
  plain = {'compensate': 'none', 'target': 0.5}
  few = forecast.operations(*run(method='adapt', steps=20, **plain))
  many = forecast.operations(*run(method='adapt', steps=40, **plain))
  pass_ = 32 * 4 * flops.forward(CONFIG, 8)  # forward twice, and the backward
  assert many - few == pytest.approx(10 * pass_)  # half of the steps reach a half


def test_a_narrowed_model_is_cheaper_to_train_and_its_teacher_is_not() -> None:
  def step(**options: object) -> float:
    return forecast.operations(*run(64_000, **options)) - forecast.operations(*run(32_000, **options))

  whole = 32_000 * flops.forward(CONFIG, 16)
  assert step(alpha=1.0, target=1.0) == pytest.approx(4 * whole)
  student = 32_000 * flops.forward(narrowed_config(CONFIG, 24), 16)
  assert step(alpha=1.0, target=1.0, hidden=24) == pytest.approx(whole + 3 * student)
  plain = {'compensate': 'none', 'target': 1.0}
  passes = forecast.operations(*run(hidden=24, **plain)) - forecast.operations(*run(**plain))
  scoring = 3 * 4 * 8 * (flops.forward(CONFIG, 8) - flops.forward(narrowed_config(CONFIG, 24), 8))
  # The stream is measured, then both models run to be fitted and to be corrected, all without the head.
  whole, small = (
    flops.forward(c, 8) - 2 * c.vocab_size * c.hidden_size for c in (CONFIG, narrowed_config(CONFIG, 24))
  )
  assert passes == pytest.approx(4 * 8 * (3 * whole + 2 * small) - scoring)


@pytest.mark.parametrize('method', choices('prune.method'))
def test_every_method_has_a_forecast(method: str) -> None:
  assert forecast.operations(*run(method=method, compensate='none')) > 32 * flops.forward(CONFIG, 8)


@pytest.mark.parametrize('speed, said', [(1e6, True), (1e15, False)])
def test_only_long_runs_announce_themselves(speed: float, said: bool, monkeypatch, capsys) -> None:
  monkeypatch.setattr(forecast, '_speed', lambda inputs: speed)
  forecast.announce([run(10_000_000)])
  assert ('this will take about' in capsys.readouterr().out) == said


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0 s'),
    (0.0351, '0.035 s'),
    (9.44, '9.4 s'),
    (9.96, '10 s'),
    (40.4, '40 s'),
    (720, '12 min'),
    (12_600, '3.5 h'),
  ],  # fmt: skip
)
def test_a_duration_keeps_two_digits_however_short(seconds: float, text: str) -> None:
  assert forecast.duration(seconds) == text


@pytest.mark.parametrize(
  ('stages', 'first', 'text'),
  [
    (1, 0, '65 min more: 40.0 s for each of 98 training steps'),
    (1, 5, '62 min more: 40.0 s for each of 93 training steps'),
    (2, 0, '2.1 h more: 40.0 s for each of 98 training steps, 3600 s for one more pruning'),
    (2, 5, '62 min more, without one more pruning: 40.0 s for each of 93 training steps'),
    (4, 0, '4.1 h more: 40.0 s for each of 98 training steps, 3600 s for each of 3 more prunings'),
    (4, 5, '62 min more, without 3 more prunings: 40.0 s for each of 93 training steps'),
  ],
)
def test_a_run_that_resumes_in_a_stage_says_what_its_time_leaves_out(
  stages: int, first: int, text: str, capsys, monkeypatch
) -> None:
  run = Run.__new__(Run)
  run.options = from_dict({'train': {'batch': 2, 'length': 16}})
  run._schedule, run._estimated = Schedule((1,) * stages, (100,) * stages), False
  run._metrics = types.SimpleNamespace(write=lambda *args, **fields: None)
  speed = {'tokens_per_second': 2 * 16 / 40}
  recovery = types.SimpleNamespace(
    steps=lambda stage, state: [Trained(first + n, speed, None) for n in (1, 2)]
  )
  # The stage began an hour ago; in a resumed one that is its pruning and some of its training.
  monkeypatch.setattr('adapt_jax.pipeline.run.time', types.SimpleNamespace(monotonic=lambda: 3600.0))
  run._train(1, types.SimpleNamespace(train_step=first), recovery, start=0.0)
  assert capsys.readouterr().out == f'the run will take about {text}\n'
