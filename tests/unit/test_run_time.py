"""A run says how long it will take after two training steps."""

import types

import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.config.units import duration
from adapt_jax.pipeline.run import Run
from adapt_jax.pipeline.schedule import Schedule
from adapt_jax.training.loop import Trained


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0, '0 s'), (0.0351, '0.035 s'), (9.44, '9.4 s'), (9.96, '10 s'), (720, '12 min'), (12_600, '3.5 h')],
)
def test_a_duration_keeps_two_digits_however_short(seconds: float, text: str) -> None:
  assert duration(seconds) == text


@pytest.mark.parametrize(
  ('stages', 'first', 'times'),
  [
    (1, 0, ('1.6 h', '40.0 s for each of 98', '31 min for evaluation and export')),
    (2, 5, ('1.7 h', 'without 1 more pruning', '40.0 s for each of 93')),
    (4, 0, ('5.1 h', '40.0 s for each of 98', '3600 s each for 3')),
  ],
)
def test_time_of_a_run_and_what_it_leaves_out_after_a_resume(
  stages: int, first: int, times: tuple[str, ...], capsys, monkeypatch
) -> None:
  run = Run.__new__(Run)
  run.options = from_dict({'train': {'batch': 2, 'length': 16}})
  run._schedule, run._estimated = Schedule((1,) * stages, (100,) * stages), False
  run._quality, run._saving_seconds = types.SimpleNamespace(seconds=600.0), 60.0  # an evaluation, and a save
  run._metrics = types.SimpleNamespace(write=lambda *args, **fields: None)
  run._store = types.SimpleNamespace(check=lambda: None)
  speed = {'tokens_per_second': 2 * 16 / 40}
  recovery = types.SimpleNamespace(
    steps=lambda stage, state: [Trained(first + n, speed, None) for n in (1, 2)]
  )
  # The stage began an hour ago; in a resumed one that is its pruning and some of its training.
  monkeypatch.setattr('adapt_jax.pipeline.run.time', types.SimpleNamespace(monotonic=lambda: 3600.0))
  run._train(1, types.SimpleNamespace(train_step=first), recovery, start=0.0)
  said = capsys.readouterr().out
  assert all(time in said for time in times)
