"""A run that takes hours says so at its start, and a short one does not."""

import types

import numpy as np
import pytest

from adapt_jax.config.build import from_dict
from adapt_jax.models.config import count_params
from adapt_jax.pipeline import forecast
from tests.support.helpers import tiny_config

CONFIG = tiny_config()


def run(tokens: int = 0, alpha: float = 0.0, **prune: object):
  options = from_dict(
    {
      'prune': {'calibration': {'samples': 4, 'length': 8}} | prune,
      'train': {'tokens': tokens, 'batch': 2, 'length': 16, 'distill': {'alpha': alpha}},
    }
  )
  inputs = types.SimpleNamespace(
    source=types.SimpleNamespace(config=CONFIG),
    evaluate={'text': types.SimpleNamespace(tokens=np.zeros((3, 16)))},
    train='rows' if tokens else None,
    dtype=np.float32,
  )
  return options, inputs


def test_training_counts_the_pruned_model_and_its_teacher() -> None:
  dense = count_params(CONFIG)
  more = forecast.operations(*run(64_000, target=0.5)) - forecast.operations(*run(32_000, target=0.5))
  assert more == pytest.approx(32_000 * 6 * dense / 2, rel=1e-3)
  taught = forecast.operations(*run(64_000, alpha=1.0, target=0.5))
  assert taught - forecast.operations(*run(64_000, target=0.5)) == pytest.approx(64_000 * 2 * dense)


def test_progressive_methods_score_at_every_step() -> None:
  plain = {'compensate': 'none', 'target': 0.5}
  once = forecast.operations(*run(method='obs', **plain))
  often = forecast.operations(*run(method='adapt', steps=40, **plain))
  assert often - once == pytest.approx(19 * 8 * 32 * count_params(CONFIG))  # 20 of 40 steps reach a half


@pytest.mark.parametrize('speed, said', [(1e6, True), (1e15, False)])
def test_only_long_runs_announce_themselves(speed: float, said: bool, monkeypatch, capsys) -> None:
  monkeypatch.setattr(forecast, '_speed', lambda inputs: speed)
  forecast.announce([run(10_000_000)])
  assert ('this will take hours: about' in capsys.readouterr().out) == said


def test_the_speed_is_that_of_products_here() -> None:
  assert 1e8 < forecast._speed(run()[1]) < 1e16
