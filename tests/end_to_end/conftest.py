"""Runs in one process of tests share compiled programs."""

import pytest

from tests.support import programs


@pytest.fixture(scope='module', autouse=True)
def traced_once():
  with programs.traced_once():
    yield
